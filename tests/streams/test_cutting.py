"""Documents become the pieces that a naive loop cuts, wherever it begins."""

from collections import Counter

import numpy as np
import pytest
from naive_stream import NaiveStream

from gpt2x.corpus.documents import is_validation
from gpt2x.errors import UserError
from gpt2x.shards.writer import Vocabulary
from gpt2x.streams.cutting import Cutter
from gpt2x.streams.ledger import Position
from gpt2x.streams.reading import Row
from gpt2x.tokenizers.bpe import load_tokenizer, text_encoder, tokenizer_fingerprint


def rows_of(texts):
    return [Row(Position(epoch=2, state={"row": number}), text) for number, text in enumerate(texts)]


@pytest.fixture
def cutter(section):
    tokenizer = load_tokenizer(section.tokenizer)
    vocabulary = Vocabulary(
        size=300, eos_token_id=tokenizer.eos_token_id, fingerprint=tokenizer_fingerprint(tokenizer)
    )
    return Cutter(section.corpus, text_encoder(tokenizer), vocabulary, tokens_per_shard=section.tokens_per_shard)


def tokens(piece):
    return np.concatenate(piece.documents.ids).tolist()


def test_pieces_are_cut_before_the_document_that_does_not_fit(texts, section, cutter, monkeypatch):
    expected = NaiveStream(texts, section).epoch_shards
    every = rows_of([text for file in texts for text in file])
    for characters_per_batch in (1, 700, 10**6):
        monkeypatch.setattr("gpt2x.tokenizers.encoding.CHARACTERS_PER_BATCH", characters_per_batch)
        pieces = list(cutter.cut(every, every[0].start))
        assert [tokens(piece) for piece in pieces] == expected
        assert max(piece.documents.num_tokens for piece in pieces) <= section.tokens_per_shard
    assert [piece.start for piece in pieces[1:]] == [piece.end for piece in pieces[:-1]]
    assert pieces[-1].end == Position(epoch=3)


def test_the_pieces_after_a_place_are_the_same_when_cutting_begins_there(texts, cutter):
    every = rows_of([text for file in texts for text in file])
    pieces = list(cutter.cut(every, every[0].start))
    for number in (1, 2, len(pieces) - 1):
        first = pieces[number].start.state["row"]
        assert list(map(tokens, cutter.cut(every[first:], every[first].start))) == list(map(tokens, pieces[number:]))


def test_a_document_longer_than_a_shard_has_a_piece_to_itself(texts, section, cutter):
    short = NaiveStream(texts, section).training[0]
    long = next(text for n in range(99) if not is_validation(text := short * 30 + str(n), section.corpus))
    pieces = list(cutter.cut(rows_of([short, long, short]), Position()))
    assert [len(piece.documents.ids) for piece in pieces] == [1, 1, 1]
    assert pieces[1].documents.num_tokens > section.tokens_per_shard


def test_rows_that_are_left_out_are_counted_by_reason(texts, section, cutter):
    naive = NaiveStream(texts, section)
    (piece,) = cutter.cut(rows_of([naive.training[0], None, " \n", "\ud800", naive.held_out[0]]), Position())
    assert piece.left_out == Counter({"empty": 2, "not UTF-8": 1, "held out": 1})
    assert piece.documents.num_bytes == len(naive.training[0].encode())


def test_held_out_documents_are_kept_at_the_beginning_of_the_stream_only(texts, section, cutter):
    held_out = NaiveStream(texts, section).held_out
    (first,) = cutter.cut(rows_of(held_out), Position())
    (later,) = cutter.cut(rows_of(held_out), Position(epoch=1))
    assert (len(first.held_out.ids), len(later.held_out.ids)) == (len(held_out), 0)


def test_text_that_spells_the_end_of_text_stays_text(texts, section, cutter):
    (piece,) = cutter.cut(rows_of(["a<|endoftext|>b " + NaiveStream(texts, section).training[0]]), Position())
    assert tokens(piece).count(cutter.vocabulary.eos_token_id) == 1


def test_an_id_outside_the_vocabulary_is_refused(texts, cutter):
    cutter.vocabulary = Vocabulary(size=200, eos_token_id=0, fingerprint="f")
    with pytest.raises(UserError, match=r"the tokenizer gives id \d+, outside its vocabulary of 200; repair"):
        list(cutter.cut(rows_of(texts[0]), Position()))


def test_a_long_document_is_encoded_in_pieces_to_the_same_ids(texts, section, cutter, monkeypatch):
    every = rows_of([text for file in texts for text in file])
    expected = [tokens(piece) for piece in cutter.cut(every, every[0].start)]
    for module in ("gpt2x.corpus.cutting", "gpt2x.streams.cutting"):
        monkeypatch.setattr(f"{module}.CHARACTERS_PER_PIECE", 50)
    assert [tokens(piece) for piece in cutter.cut(every, every[0].start)] == expected
    assert max(len(row.value) for row in every) > 100
