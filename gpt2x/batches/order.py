"""The global order: which window of which source stands at position i, as a pure function of (seed, mixture, i).

Positions are cut into blocks. In each block every source has a fixed number of places, so the mixture's weights are
kept exactly and all along; which places, a permutation keyed by (seed, block) says. The places of one source, counted
from the first block on, run through its epochs, and each epoch is a permutation of the source's windows keyed by
(seed, source, epoch).

Nothing is stored but the seed: not the number of processes, no iterator, no permuted array. So a run goes on at any
position, on any number of devices, with the same samples in the same order.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from gpt2x.batches.source import Source
from gpt2x.errors import UserError

NUM_ROUNDS = 8


def round_keys(*key: int | str) -> np.ndarray:
    """(NUM_ROUNDS,) uint64, from whatever names a permutation."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * NUM_ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0..size-1 sends values, in O(1) memory.

    A Feistel network (Luby & Rackoff, SIAM J. Comput. 17(2), 1988) permutes the numbers of as many bits as size - 1
    has; what falls outside is sent on until it falls inside (cycle walking: Black & Rogaway, CT-RSA 2002, section 3),
    which takes less than two passes on average.

    Args:
        values: (n,) integers in 0..size-1.
        size: number of elements.
        keys: from round_keys.

    Returns:
        (n,) int64 in 0..size-1.
    """
    num_bits = (size - 1).bit_length()
    permuted = _feistel(values.astype(np.uint64), num_bits, keys)
    while (outside := permuted >= size).any():
        permuted[outside] = _feistel(permuted[outside], num_bits, keys)
    return permuted.astype(np.int64)


def _feistel(values: np.ndarray, num_bits: int, keys: np.ndarray) -> np.ndarray:
    """Each round changes one half of the bits by a hash of the other, so that it can be undone."""
    low_bits = num_bits // 2
    low_mask, high_mask = np.uint64(2**low_bits - 1), np.uint64(2 ** (num_bits - low_bits) - 1)
    high, low = values >> np.uint64(low_bits), values & low_mask
    for high_key, low_key in keys.reshape(-1, 2):
        high = high ^ (_mixed(low ^ high_key) & high_mask)
        low = low ^ (_mixed(high ^ low_key) & low_mask)
    return (high << np.uint64(low_bits)) | low


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al., OOPSLA 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class GlobalOrder:
    """The order of a run's samples. All windows have the same number of tokens, so weights are shares of tokens."""

    seed: int
    """Another seed is another order."""
    names: tuple[str, ...]
    """The sources' names; a source's own order depends on no other source."""
    num_windows: tuple[int, ...]
    """How many windows each source has."""
    weights: tuple[float, ...] = field(default=(1.0,))
    """Each source's share of the samples, up to a common factor."""
    block_size: int = 1000
    """Places per block: the resolution of the weights."""

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.num_windows) == len(self.weights) > 0
        if len(set(self.names)) < len(self.names):
            raise UserError(f"the sources' names ({', '.join(self.names)}) must differ; rename one.")
        for name, count, weight in zip(self.names, self.counts_per_block, self.weights):
            if count == 0:
                raise UserError(
                    f"the weight {weight} of source {name!r} is less than one place in {self.block_size} samples; "
                    f"raise it or leave the source out."
                )

    @classmethod
    def of(cls, sources: Sequence[Source], *, seed: int, weights: Sequence[float] | None = None) -> "GlobalOrder":
        """The order of these sources; by default in proportion to their number of windows."""
        num_windows = tuple(source.num_windows for source in sources)
        names = tuple(source.name for source in sources)
        return cls(seed=seed, names=names, num_windows=num_windows, weights=tuple(weights or num_windows))

    @cached_property
    def counts_per_block(self) -> tuple[int, ...]:
        """Places per block and source: the weights' shares of block_size, rounded so that they add up to it."""
        shares = np.array(self.weights) / sum(self.weights) * self.block_size
        counts = np.floor(shares).astype(np.int64)
        by_remainder = np.argsort(counts - shares, kind="stable")
        counts[by_remainder[: self.block_size - counts.sum()]] += 1
        return tuple(counts.tolist())

    def sample_positions(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """What stands at the positions start to stop.

        Returns:
            The numbers of the sources, (stop - start,) int64, and of the windows in them, (stop - start,) int64.
        """
        positions = np.arange(start, stop)
        sources, draws = self._draws(positions)
        windows = np.empty_like(draws)
        for source in np.unique(sources):
            here = sources == source
            windows[here] = self._windows(source, draws[here])
        return sources, windows

    def _draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per position its source, and how many positions before it have the same source."""
        blocks, places = np.divmod(positions, self.block_size)
        sources, draws = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            here = blocks == block
            block_sources, block_draws = _block(self.seed, int(block), self.counts_per_block)
            sources[here] = block_sources[places[here]]
            draws[here] = block_draws[places[here]] + block * np.array(self.counts_per_block)[sources[here]]
        return sources, draws

    def _windows(self, source: int, draws: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(draws, self.num_windows[source])
        windows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            keys = round_keys(self.seed, "source", self.names[source], int(epoch))
            windows[here] = permute(places[here], self.num_windows[source], keys)
        return windows


@lru_cache(maxsize=16)
def _block(seed: int, block: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Per place of a block its source, and how many places before it in the block have the same source."""
    size = sum(counts)
    slots = permute(np.arange(size), size, round_keys(seed, "block", block))
    sources = np.searchsorted(np.cumsum(counts), slots, side="right")
    draws = np.empty_like(sources)
    for source, count in enumerate(counts):
        draws[sources == source] = np.arange(count)
    return sources, draws
