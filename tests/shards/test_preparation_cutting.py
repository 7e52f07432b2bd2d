"""A long text may be cut into pieces, and nobody can tell from its ids."""

import dataclasses
import json
import random
from collections import Counter

import numpy as np
import pytest
from published_data import needed
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gpt2x.config import CorpusSection, TokenizerSection
from gpt2x.corpus import cutting, text_files
from gpt2x.corpus import documents as corpora
from gpt2x.corpus.cutting import can_be_cut, chunks_of, cut, ids_of
from gpt2x.corpus.documents import Piece, is_validation, open_corpus, read_pieces
from gpt2x.errors import UserError
from gpt2x.preparation.prepare import prepare, prepare_tokenizer
from gpt2x.tokenizers.encoding import batches, encoded

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LLAMA3 = (
    rf"{CONTRACTIONS}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(pattern: str | None) -> Tokenizer:
    """A byte-level BPE with a few hundred merges, cut by a pattern or by GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([awkward_text(seed) for seed in range(8)], trainer)
    return tokenizer


def awkward_text(seed: int) -> str:
    """Whitespace, line ends, punctuation, digits and letters of several scripts in every neighbourhood."""
    letters = [
        "\n",
        "\n",
        "\n",
        "\r\n",
        " ",
        "  ",
        "\t",
        "\x0b",
        "\u2028",
        "\xa0",
        "a",
        "été",
        "中文",
        "。",
        "/",
        ";",
        "'s",
        "12",
    ]
    return "".join(
        random.Random(seed).choices([*letters, "\u180e", "\u0301", "//", "👩‍👩‍👧", "\ufeff", "\x85"], k=2000)
    )


@pytest.mark.parametrize("pattern", [None, LLAMA3, GPT4O], ids=["GPT-2", "Llama 3", "GPT-4o"])
def test_the_pieces_have_the_ids_of_the_whole_wherever_it_is_cut(pattern, monkeypatch):
    monkeypatch.setattr(cutting, "CHARACTERS_PER_PIECE", 40)
    encoder = byte_level(pattern)
    assert can_be_cut(encoder)
    num_pieces = 0
    for seed in range(20):
        text = awkward_text(seed)
        pieces = list(cut(chunks_of(text)))
        num_pieces += len(pieces)
        assert "".join(pieces) == text
        assert [token for piece in pieces for token in encoder.encode(piece).ids] == encoder.encode(text).ids
    assert num_pieces > 200


def test_a_text_without_lines_is_one_piece(monkeypatch):
    monkeypatch.setattr(cutting, "CHARACTERS_PER_PIECE", 10)
    assert list(cut(chunks_of("word " * 100))) == ["word " * 100]
    assert list(cut(chunks_of("\n" * 100))) == ["\n" * 100]


@pytest.mark.parametrize("pattern", [None, LLAMA3, GPT4O], ids=["GPT-2", "Llama 3", "GPT-4o"])
def test_without_lines_a_text_is_cut_between_words_to_the_same_ids(pattern, monkeypatch):
    monkeypatch.setattr(cutting, "CHARACTERS_PER_PIECE", 40)
    monkeypatch.setattr(cutting, "LONGEST_PIECE", 80)
    encoder = byte_level(pattern)
    num_pieces = 0
    for seed in range(20):
        # Behind every awkward stretch come two words, so that no cut has to be anywhere.
        awkward = [awkward_text(100 * seed + number)[:20].replace("\n", ".") for number in range(99)]
        text = "".join(f"{part} weird été Über 中文 words" for part in awkward)
        pieces = list(cut(chunks_of(text)))
        num_pieces += len(pieces)
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 80 + 40
        assert [token for piece in pieces for token in encoder.encode(piece).ids] == encoder.encode(text).ids
    assert num_pieces > 200


@pytest.mark.parametrize("text", ["x" * 1000, " " * 1000, "1,2;" * 250, "\n" * 1000, "中文" * 500])
def test_a_text_without_words_is_cut_all_the_same(text, monkeypatch):
    monkeypatch.setattr(cutting, "CHARACTERS_PER_PIECE", 10)
    monkeypatch.setattr(cutting, "LONGEST_PIECE", 40)
    pieces = list(cut(chunks_of(text)))
    assert "".join(pieces) == text
    assert {len(piece) for piece in pieces} == {40}


@pytest.mark.parametrize("text", ["word " * 2000, "üx" * 5000, "line\nand line " * 700])
def test_the_pieces_of_a_text_do_not_depend_on_the_file_it_is_in(text, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONG_FILE_BYTES", 1000)
    monkeypatch.setattr(cutting, "LONGEST_PIECE", 400)
    for module in (cutting, corpora):
        monkeypatch.setattr(module, "CHARACTERS_PER_PIECE", 100)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(f"before;{text};behind")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "d.csv").write_text('text\n"' + text + '"\n')
    found = []
    for name in ("a.txt", "b.txt", "c.jsonl", "d.csv"):
        separator = ";" if name == "b.txt" else None
        corpus = CorpusSection(kind="files", paths=[str(tmp_path / name)], document_separator=separator)
        pieces = read_pieces(open_corpus(corpus, lambda _: None), dropped=Counter(), cuts=True)
        found.append([piece.text for piece in pieces if piece.text not in ("before", "behind")])
    assert found[1:] == found[:1] * 3
    assert len(found[0]) > 20


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_tokenizer_that_must_see_a_document_whole_is_not_given_a_huge_one(tmp_path, monkeypatch, name):
    monkeypatch.setattr(cutting, "LONGEST_WHOLE", 500)
    monkeypatch.setattr(text_files, "LONG_FILE_BYTES", 300)
    (tmp_path / name).write_text("x" * 501 if name == "a.txt" else json.dumps({"text": "x" * 501}))
    corpus = CorpusSection(kind="files", paths=[str(tmp_path / name)])
    complaint = rf"{name}(:1)? has more than 500 characters, and this tokenizer must see a document whole; cut it into"
    with pytest.raises(UserError, match=complaint):
        list(read_pieces(open_corpus(corpus, lambda _: None), dropped=Counter(), cuts=False))


def test_the_ids_of_a_long_text_are_those_of_its_pieces(monkeypatch):
    monkeypatch.setattr(cutting, "CHARACTERS_PER_PIECE", 40)
    encoder, text = byte_level(None), awkward_text(7)
    assert ids_of(text, encoder, cuts=True, name="x").tolist() == encoder.encode(text).ids
    assert ids_of(text, encoder, cuts=False, name="x").tolist() == encoder.encode(text).ids


def test_a_tokenizer_is_trained_without_words_of_no_language(monkeypatch):
    monkeypatch.setattr(cutting, "LONGEST_PIECE", 100)
    monkeypatch.setattr(cutting, "LONGEST_RUN", 50)
    assert cutting.without_runs("a b " + "x" * 99 + " c" + " " * 99) == "a b  c"
    assert cutting.without_runs("x" * 99) == "x" * 99
    assert cutting.without_runs("word 12 -- __ " * 20) == "word 12 -- __ " * 20


def test_many_tiny_documents_are_not_all_encoded_at_once():
    pieces = [Piece(str(number), "x", False, True) for number in range(10_000)]
    sizes = [len(batch) for batch in batches(pieces)]
    assert sum(sizes) == 10_000
    assert max(sizes) <= 4_000


def test_a_tokenizer_that_sees_more_than_lines_is_not_given_pieces():
    prefix, added, normalized = (byte_level(None) for _ in range(3))
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    added.add_tokens(["\nsecond"])
    normalized.normalizer = normalizers.Strip()
    assert [can_be_cut(encoder) for encoder in (prefix, added, normalized)] == [False] * 3


@pytest.fixture
def long_file(corpus_dir, monkeypatch) -> str:
    """A file that is held to be too long for memory, beside the fixture's."""
    monkeypatch.setattr(text_files, "LONG_FILE_BYTES", 1000)
    for module in (cutting, corpora):
        monkeypatch.setattr(module, "CHARACTERS_PER_PIECE", 100)
    text = "".join(f"line {number} of the long file: grün, 中文.\n\n  {number}\n" for number in range(400))
    (corpus_dir / "long.txt").write_text(text)
    return text


def test_a_long_file_is_one_document_with_the_ids_of_one_piece(recipe, long_file):
    tokenizer = prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    index = prepare(recipe)
    side = "validation" if is_validation(long_file, recipe.corpus) else "train"
    lengths = {shard.tokens.size: shard for shard in index.open_split(side) if shard.documents.size == 2}
    expected = tokenizer(long_file)["input_ids"] + [tokenizer.eos_token_id]
    assert lengths[len(expected)].tokens.tolist() == expected
    assert index.total("train", "num_documents") + index.total("validation", "num_documents") == 62


def test_the_pieces_of_a_document_fall_on_its_side_also_where_two_copies_are_read_differently(recipe, long_file):
    for seed in range(6):
        corpus = dataclasses.replace(recipe.corpus, validation_fraction=0.5, split_seed=seed)
        pieces = list(read_pieces(open_corpus(corpus, lambda _: None), dropped=Counter(), cuts=True))
        sides = {piece.is_validation for piece in pieces if piece.name.endswith("long.txt")}
        assert sides == {is_validation(long_file, corpus)}
        assert sum(piece.is_last for piece in pieces) == 62


@pytest.mark.parametrize(("content", "reason"), [(b" \n" * 999, "empty"), (b"x" * 1500 + b"\xc3", "not UTF-8")])
def test_a_long_file_that_is_no_text_is_left_out(recipe, corpus_dir, long_file, content, reason):
    (corpus_dir / "long.txt").write_bytes(content)
    assert prepare(recipe).dropped == {reason: 1}


@pytest.mark.trial
def test_tiny_shakespeare_has_the_published_number_of_tokens(tmp_path, recipe, monkeypatch):
    file, tokenizer = needed("tinyshakespeare/input.txt"), needed("gpt2-tokenizer")
    corpus = CorpusSection(kind="files", paths=[str(file)], validation_fraction=0)
    recipe = dataclasses.replace(recipe, corpus=corpus, tokenizer=TokenizerSection(path=str(tokenizer)))
    whole = prepare(dataclasses.replace(recipe, output_dir=tmp_path / "whole"))
    monkeypatch.setattr(text_files, "LONG_FILE_BYTES", 10_000)
    monkeypatch.setattr(cutting, "CHARACTERS_PER_PIECE", 5_000)
    monkeypatch.setattr(corpora, "CHARACTERS_PER_PIECE", 5_000)
    pieces = prepare(dataclasses.replace(recipe, output_dir=tmp_path / "pieces"))
    assert whole.total("train", "num_tokens") == 338_025 + 1
    assert pieces.splits["train"] == whole.splits["train"]
    assert np.array_equal(pieces.open_split("train")[0].documents, [0, 338_026])


def test_of_texts_that_take_gigabytes_one_is_encoded_at_a_time():
    """Each of three millions of characters, as a tokenizer gets them that must see them whole."""
    done: list[str] = []

    class Encoder:
        def encode_batch_fast(self, texts, add_special_tokens):
            done.extend(texts)
            return texts

    def pieces():
        for number in range(4):
            assert len(done) == number, "the one before has not been waited for"
            yield Piece(str(number), str(number) * 3_000_000, False, True)

    found = [piece.name for batch, _ in encoded(pieces(), Encoder()) for piece in batch]
    assert found == ["0", "1", "2", "3"]
