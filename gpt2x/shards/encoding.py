"""Pieces of text to ids, a batch at a time."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from tokenizers import Encoding, Tokenizer

from gpt2x.shards.corpus import Piece

# What is given to the tokenizer at once: enough for its threads; more takes half as long again, as the encodings,
# a hundred bytes per token, leave the processor's caches.
CHARACTERS_PER_BATCH = 400_000


def encoded(pieces: Iterable[Piece], encoder: Tokenizer) -> Iterator[tuple[list[Piece], list[Encoding]]]:
    """Encodes two batches ahead, in the tokenizer's own threads, while this one reads, hashes and writes."""
    ahead: deque[tuple[list[Piece], Future[list[Encoding]]]] = deque()
    with ThreadPoolExecutor(2) as threads:
        for batch in _batches(pieces):
            texts = [piece.text for piece in batch]
            ahead.append((batch, threads.submit(encoder.encode_batch_fast, texts, add_special_tokens=False)))
            if len(ahead) > 2:
                encoded, future = ahead.popleft()
                yield encoded, future.result()
        for encoded, future in ahead:
            yield encoded, future.result()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
