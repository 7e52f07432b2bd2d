"""Pieces of text to ids, a batch at a time."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from tokenizers import Encoding, Tokenizer

from gpt2x.corpus.documents import Piece

# What is given to the tokenizer at once: enough for its threads; more takes half as long again, as the encodings,
# a hundred bytes per token, leave the processor's caches.
CHARACTERS_PER_BATCH = 400_000
# An encoding takes a kilobyte however short its text is.
TEXTS_PER_BATCH = 4_000
# Beyond it the tokenizer is waited for: a text that may not be cut takes 150 bytes per character while it is encoded.
CHARACTERS_AHEAD = 2_500_000


def encoded(pieces: Iterable[Piece], encoder: Tokenizer) -> Iterator[tuple[list[Piece], list[Encoding]]]:
    """Encodes two batches ahead, in the tokenizer's own threads, while this one reads, hashes and writes; less where
    texts are very long."""
    ahead: deque[tuple[list[Piece], Future[list[Encoding]]]] = deque()
    with ThreadPoolExecutor(2) as threads:
        for batch in batches(pieces):
            texts = [piece.text for piece in batch]
            ahead.append((batch, threads.submit(encoder.encode_batch_fast, texts, add_special_tokens=False)))
            while len(ahead) > 2 or _characters(ahead) > CHARACTERS_AHEAD:
                encoded, future = ahead.popleft()
                yield encoded, future.result()
        for encoded, future in ahead:
            yield encoded, future.result()


def text_reader(backend: Tokenizer) -> Tokenizer:
    """Makes a tokenizer read documents: text that spells a special token stays text."""
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _characters(ahead: Iterable[tuple[list[Piece], object]]) -> int:
    return sum(len(piece.text) for batch, _ in ahead for piece in batch)


class HasText(Protocol):
    """Anything with a text: a piece of a document, a row of a stream."""

    @property
    def text(self) -> str:
        """What is tokenized."""


Texts = TypeVar("Texts", bound=HasText)


def batches(pieces: Iterable[Texts]) -> Iterator[list[Texts]]:
    """What is given to the tokenizer at once, in order: whole pieces until there are CHARACTERS_PER_BATCH, or
    TEXTS_PER_BATCH of them."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= CHARACTERS_PER_BATCH or len(batch) >= TEXTS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
