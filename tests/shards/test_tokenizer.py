"""A trained tokenizer gives every text back, loads anywhere, and is the same each time."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from transformers import AutoTokenizer

from gpt2x.config import TokenizerSection
from gpt2x.corpus.documents import open_corpus, read_pieces
from gpt2x.errors import UserError
from gpt2x.tokenizers.bpe import (
    load_tokenizer,
    save_tokenizer,
    text_encoder,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)

TEXTS = [
    "def f(x):\n        return x  # 12345\n\n\n\tif y:\n",
    "it's , spaced . out ! and 'quoted' n't",
    "  leading and trailing  ",
    "\r\n \u00a0\u2003\u2028 odd spaces \t\x0b\x0c",
    "grün façade — naïve “quotes” … ñ n\u0303 ﬁ",
    "日本語 עברית العربية हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "\x00\x01\x7f\u200b\ufeff\ufffd",
    "<|endoftext|> and <|endoftext|>",
    "",
]


def texts(corpus):
    reading = open_corpus(corpus, lambda _: None)
    return (piece.text for piece in read_pieces(reading, dropped=Counter(), cuts=False))


@pytest.fixture
def section(tmp_path):
    return TokenizerSection(path=str(tmp_path / "tokenizer"), vocab_size=300)


@pytest.fixture
def tokenizer(corpus, section):
    return train_tokenizer(texts(corpus), section)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_the_ids_of_a_text_gives_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_a_document_gives_the_document(tokenizer, text):
    assert tokenizer.decode(text_encoder(tokenizer).encode(text, add_special_tokens=False).ids) == text


def test_the_vocabulary_has_the_size_asked_for_and_every_byte(tokenizer):
    assert len(tokenizer) == vocabulary_size(tokenizer) == 300
    assert tokenizer.convert_tokens_to_ids("é") is None or len(tokenizer("é")["input_ids"]) == 2


def test_training_again_gives_the_same_tokenizer_also_in_another_process(corpus, section, tokenizer, tmp_path):
    code = (
        "import sys; from gpt2x.config import CorpusSection, TokenizerSection;"
        "from collections import Counter; from gpt2x.tokenizers.bpe import *;"
        "from gpt2x.corpus.documents import open_corpus, read_pieces;"
        "corpus = CorpusSection(kind='files', paths=[sys.argv[1]]);"
        "section = TokenizerSection(path='x', vocab_size=300);"
        "reading = open_corpus(corpus, lambda _: None);"
        "pieces = read_pieces(reading, dropped=Counter(), cuts=True);"
        "print(tokenizer_fingerprint(train_tokenizer((piece.text for piece in pieces), section)))"
    )
    other = subprocess.run([sys.executable, "-c", code, corpus.paths[0]], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == tokenizer_fingerprint(tokenizer)


def test_a_saved_tokenizer_loads_as_any_transformers_tokenizer(tokenizer, section, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(section.path)
    assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == ("<|endoftext|>",) * 3
    assert loaded.clean_up_tokenization_spaces is False
    assert [loaded(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_a_saved_tokenizer_names_its_class_as_older_readers_know_it(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]


def test_a_tokenizer_that_was_loaded_is_saved_as_the_one_it_was_loaded_from(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    save_tokenizer(load_tokenizer(tmp_path / "tokenizer"), tmp_path / "again")
    first, again = (
        json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("tokenizer", "again")
    )
    assert again == first
    assert not {"is_local", "local_files_only"} & again.keys()


def test_a_chat_template_is_saved_where_old_readers_and_where_new_ones_look(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == tokenizer.chat_template
    assert (tmp_path / "tokenizer" / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert load_tokenizer(tmp_path / "tokenizer").chat_template == tokenizer.chat_template


def test_saving_leaves_nothing_else_behind_and_what_others_have_left_stays(tokenizer, tmp_path):
    (tmp_path / "tokenizer.tmp").mkdir()
    (tmp_path / "tokenizer.tmp" / "tokenizer.json").write_text("{")
    save_tokenizer(tokenizer, tmp_path / "deep" / "tokenizer")
    assert sorted(path.name for path in tmp_path.iterdir() if "token" in path.name) == ["tokenizer.tmp"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tokenizer"]


def test_nothing_that_is_there_is_saved_over(tokenizer, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("of somebody")
    with pytest.raises(UserError, match=r"mine could not be written \(Directory not empty\)"):
        save_tokenizer(tokenizer, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_text_that_spells_a_special_token_stays_text_in_a_document(tokenizer):
    ids = text_encoder(tokenizer).encode("a<|endoftext|>b", add_special_tokens=False).ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.eos_token_id in tokenizer("a<|endoftext|>b")["input_ids"], "elsewhere it is the token"


def test_the_fingerprint_survives_saving_and_use(tokenizer, section, tmp_path):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b b b"], padding=True, truncation=True, max_length=2)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    assert tokenizer_fingerprint(load_tokenizer(section.path)) == tokenizer_fingerprint(tokenizer) == before


def test_the_fingerprint_differs_between_tokenizers(corpus, tokenizer):
    other = TokenizerSection(path="x", vocab_size=299)
    smaller = train_tokenizer(texts(corpus), other)
    assert tokenizer_fingerprint(smaller) != tokenizer_fingerprint(tokenizer)


def test_too_little_text_for_the_vocabulary_is_refused(section):
    with pytest.raises(UserError, match=r"vocab_size \(300\) is more than .* enough for; set it to 260 or less"):
        train_tokenizer(["abc abc"], section)


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere does not exist; give a tokenizer's directory \(scripts/train_tokenizer.py makes"
    ):
        load_tokenizer(tmp_path / "nowhere")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer; train one by scripts/train_tokenizer.py"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_of_text_is_refused(tokenizer, tmp_path):
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"has no end-of-text token; set eos_token in its tokenizer_config.json"):
        load_tokenizer(tmp_path / "tokenizer")
