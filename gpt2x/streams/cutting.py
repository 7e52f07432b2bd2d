"""Cutting a stream's documents into shards.

    rows -> documents -> batches of token ids -> pieces, one per shard

What a piece holds depends on the place where it begins and on nothing else: not on how rows were batched, where a
connection broke, or which pieces were cut before.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from gpt2x.config import CorpusSection
from gpt2x.corpus.cutting import CHARACTERS_PER_PIECE, can_be_cut, ids_of
from gpt2x.corpus.documents import is_validation
from gpt2x.corpus.rows import text_of
from gpt2x.errors import UserError
from gpt2x.shards.files import token_dtype
from gpt2x.shards.writer import Vocabulary
from gpt2x.streams.ledger import Position
from gpt2x.streams.reading import Row
from gpt2x.tokenizers.encoding import batches


class Document(NamedTuple):
    """A document of a stream, or what is left of one that is left out."""

    start: Position
    text: str
    """Nothing for a document that is of no use here."""
    left_out: str | None
    """Why it is in no training shard: empty, not UTF-8, held out."""


@dataclass(kw_only=True)
class Documents:
    """The token ids of documents, one after the other."""

    ids: list[np.ndarray] = field(default_factory=list)
    num_tokens: int = 0
    num_bytes: int = 0

    def add(self, ids: np.ndarray, text: str) -> None:
        """Appends a document's ids, (num_tokens,) of the shard's dtype, its end of text included."""
        self.ids.append(ids)
        self.num_tokens += ids.size
        self.num_bytes += len(text.encode())

    def starts(self) -> np.ndarray:
        """Where each document starts, and the end, (num_documents + 1,) int64."""
        return np.cumsum([0, *(ids.size for ids in self.ids)])


@dataclass(kw_only=True)
class Piece:
    """What goes into one shard."""

    start: Position
    end: Position = field(default_factory=Position)
    documents: Documents = field(default_factory=Documents)
    held_out: Documents = field(default_factory=Documents)
    left_out: Counter[str] = field(default_factory=Counter)


class Cutter:
    """Cuts the rest of an epoch into pieces."""

    def __init__(
        self, corpus: CorpusSection, tokenizer: Tokenizer, vocabulary: Vocabulary, *, tokens_per_shard: int
    ) -> None:
        self.corpus, self.tokenizer, self.vocabulary = corpus, tokenizer, vocabulary
        self.tokens_per_shard, self.dtype = tokens_per_shard, token_dtype(vocabulary.size)
        self._keeps_held_out = False

    def cut(self, rows: Iterable[Row], start: Position) -> Iterator[Piece]:
        """The pieces from a position on; the last one ends where the next epoch begins.

        Each ends before the document that would make it longer than tokens_per_shard; a document longer than that
        has a piece to itself. The piece at the beginning of the stream also has the held-out documents that lie there.
        """
        self._keeps_held_out = start == Position()
        piece = Piece(start=start)
        for document, ids in self._encoded(map(self._document, rows)):
            if document.left_out:
                piece.left_out[document.left_out] += 1
                if document.text:
                    piece.held_out.add(ids, document.text)
                continue
            if piece.documents.ids and piece.documents.num_tokens + ids.size > self.tokens_per_shard:
                self._keeps_held_out = False
                yield replace(piece, end=document.start)
                piece = Piece(start=document.start)
            piece.documents.add(ids, document.text)
        yield replace(piece, end=Position(epoch=start.epoch + 1))

    def _document(self, row: Row) -> Document:
        reasons: Counter[str] = Counter()
        text = text_of(
            row.value, name=f"a row of {self.corpus.dataset}", column=self.corpus.text_column, dropped=reasons
        )
        if text is None:
            return Document(row.start, "", *reasons)
        if not is_validation(text, self.corpus):
            return Document(row.start, text, None)
        return Document(row.start, text if self._keeps_held_out else "", "held out")

    def _encoded(self, documents: Iterable[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        """Every document with its ids and the end of text."""
        for batch in batches(documents):
            short = [one.text if len(one.text) <= CHARACTERS_PER_PIECE else "" for one in batch]
            encodings = self.tokenizer.encode_batch_fast(short, add_special_tokens=False)
            for document, text, encoding in zip(batch, short, encodings, strict=True):
                found = encoding.ids if text == document.text else self._ids_of_long(document.text)
                ids = np.array([*found, self.vocabulary.eos_token_id])
                if ids.max() >= self.vocabulary.size:
                    raise UserError(
                        f"the tokenizer gives id {ids.max()}, outside its vocabulary of {self.vocabulary.size}; "
                        f"repair the tokenizer or use another."
                    )
                yield document, ids.astype(self.dtype)

    def _ids_of_long(self, text: str) -> np.ndarray:
        return ids_of(text, self.tokenizer, cuts=can_be_cut(self.tokenizer), name=f"a row of {self.corpus.dataset}")
