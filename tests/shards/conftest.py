"""A corpus of two kinds of files, and the recipe that prepares it in a fraction of a second."""

import json
import random
from pathlib import Path

import pytest

from gpt2x.config import CorpusSection, PreparationRecipe, TokenizerSection

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
