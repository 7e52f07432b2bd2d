"""What of a shard is learned, and where its documents begin."""

from collections.abc import Iterator

import numpy as np

from gpt2x.shards.files import TOKENS_PER_CHUNK, Shard


def learned_flags(shard: Shard) -> np.ndarray:
    """(num_tokens,) of 0 and 1: the shard's targets, or where it has none ones that take no memory."""
    return np.broadcast_to(np.uint8(1), shard.tokens.shape) if shard.targets is None else shard.targets


def document_begins(shard: Shard, start: int, stop: int) -> np.ndarray:
    """Which of the tokens from start to stop begin a document, (stop - start,) bool."""
    begins = np.zeros(stop - start, bool)
    first, end = np.searchsorted(shard.documents[:-1], [start, stop])
    begins[shard.documents[first:end] - start] = True
    return begins


def count_learned(shard: Shard, *, counts_first: bool) -> Iterator[int]:
    """Chunk by chunk of a shard how many of its tokens are learned.

    Args:
        shard: read as far as the result is.
        counts_first: whether the first token of a document counts, before which nothing of its own stands.
    """
    for start in range(0, shard.tokens.size, TOKENS_PER_CHUNK):
        stop = min(start + TOKENS_PER_CHUNK, shard.tokens.size)
        is_learned = learned_flags(shard)[start:stop] != 0
        if not counts_first:
            is_learned &= ~document_begins(shard, start, stop)
        yield int(np.count_nonzero(is_learned))
