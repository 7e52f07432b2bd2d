"""A corpus of two kinds of files and one of conversations, and recipes that prepare them in a fraction of a second."""

import json
import random
from pathlib import Path

import pytest
from chat_corpora import NUM_CHATS, SECTION, WORDS, conversation, write_rows

from gpt2x.config import CorpusSection, PreparationRecipe, TokenizerSection
from gpt2x.tokenizers.bpe import save_tokenizer, train_tokenizer

NUM_DOCUMENTS = 60


@pytest.fixture
def corpus_dir(tmp_path: Path) -> Path:
    """Sixty documents of a few hundred letters in one .jsonl, and one more in a .txt."""
    generator, directory = random.Random(0), tmp_path / "corpus"
    directory.mkdir()
    words = ["".join(generator.choices("abcdefgh", k=5)) for _ in range(200)]
    texts = [f"{number} " + " ".join(generator.choices(words, k=50)) for number in range(NUM_DOCUMENTS)]
    (directory / "many.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (directory / "one.txt").write_text("one document\nof two lines\n")
    return directory


@pytest.fixture
def corpus(corpus_dir: Path) -> CorpusSection:
    return CorpusSection(kind="files", paths=[f"{corpus_dir}/*"], validation_fraction=0.2)


@pytest.fixture
def recipe(corpus: CorpusSection, tmp_path: Path) -> PreparationRecipe:
    """Trains a vocabulary of 300 and writes shards of 2000 tokens, several for train."""
    tokenizer = TokenizerSection(path=str(tmp_path / "tokenizer"), vocab_size=300)
    return PreparationRecipe(output_dir=tmp_path / "shards", corpus=corpus, tokenizer=tokenizer, tokens_per_shard=2000)


@pytest.fixture(scope="session")
def base_tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tokenizer"
    section = TokenizerSection(path=str(path), vocab_size=280)
    save_tokenizer(train_tokenizer([" ".join(WORDS * 9) + "\nuser\nassistant\n"], section), path)
    return path


@pytest.fixture
def chats_file(tmp_path: Path) -> Path:
    """Forty conversations of two to six turns."""
    generator, file = random.Random(0), tmp_path / "chats.jsonl"
    chats = [
        conversation(*(" ".join(generator.choices(WORDS, k=generator.randrange(1, 12))) for _ in range(turns)))
        for turns in generator.choices((2, 4, 6), k=NUM_CHATS)
    ]
    write_rows(file, [{"messages": chat} for chat in chats])
    return file


@pytest.fixture
def chat_recipe(chats_file: Path, base_tokenizer: Path, tmp_path: Path) -> PreparationRecipe:
    """Writes shards of 1000 tokens, several for train."""
    return PreparationRecipe(
        output_dir=tmp_path / "shards",
        corpus=CorpusSection(kind="files", paths=[str(chats_file)], validation_fraction=0.2),
        tokenizer=TokenizerSection(path=str(base_tokenizer)),
        chat=SECTION,
        tokens_per_shard=1000,
        num_workers=1,
    )
