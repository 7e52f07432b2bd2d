"""The global order: which sample stands at which place of which step, as a pure function of (seed, mixture, place).

The places of a run are cut into blocks. In each block every source has a fixed number of places, so the mixture's
weights are kept exactly and all along; which places, a permutation keyed by (seed, block) says. The places of one
source, counted from the first block on, are its draws, and run through its epochs: each epoch is a permutation of the
source's windows keyed by (seed, source, epoch).

Nothing is stored but the seed and the phases: not the number of processes, no iterator, no permuted array. So a run
goes on at any step, on any number of devices, with the same samples in the same order. Another mixture or batch size
on the way starts a new phase, in which every source goes on where it stood.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gpt2x.errors import UserError

NUM_ROUNDS = 8
PIECE = 2048


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
        high = high ^ (mixed(low ^ high_key) & high_mask)
        low = low ^ (mixed(high ^ low_key) & low_mask)
    return (high << np.uint64(low_bits)) | low


def mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al., OOPSLA 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def epoch_windows(draws: np.ndarray, num_windows: int, *, seed: int, name: str) -> np.ndarray:
    """Which windows a source of fixed size gives at its draws: each epoch is a permutation of all of them.

    Args:
        draws: (n,) integers, how many windows of the source were drawn before.
        num_windows: of the source.
        seed: the run's.
        name: the source's; its order depends on no other source.

    Returns:
        (n,) int64 in 0..num_windows-1.
    """
    epochs, places = np.divmod(draws, num_windows)
    pieces = places // PIECE
    stretches = set(zip(epochs.tolist(), pieces.tolist()))
    if len(stretches) == 1:
        ((epoch, piece),) = stretches
        return _epoch_piece(seed, name, num_windows, epoch, piece)[places - piece * PIECE]
    windows = np.empty_like(places)
    for epoch, piece in stretches:
        here = (epochs == epoch) & (pieces == piece)
        windows[here] = _epoch_piece(seed, name, num_windows, epoch, piece)[places[here] - piece * PIECE]
    return windows


@lru_cache(maxsize=64)
def _epoch_piece(seed: int, name: str, num_windows: int, epoch: int, piece: int) -> np.ndarray:
    """A stretch of an epoch's permutation: numpy's price per call is that of some thousand elements."""
    places = np.arange(piece * PIECE, min((piece + 1) * PIECE, num_windows))
    return permute(places, num_windows, round_keys(seed, "source", name, epoch))


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run with one mixture and one batch size. All windows have the same number of tokens, so
    weights are shares of tokens."""

    first_batch: int = 0
    """The phase's first batch; the number of its step, unless batches were skipped before."""
    sequences_per_step: int
    """The batch size."""
    weights: Mapping[str, float]
    """Each source's share of the samples by its name, up to a common factor."""
    block_size: int = 1000
    """Places per block: the resolution of the weights."""

    def __post_init__(self) -> None:
        for name, count in zip(self.weights, self.counts_per_block, strict=True):
            if count == 0:
                raise UserError(
                    f"the weight {self.weights[name]} of source {name!r} is less than one place in {self.block_size} "
                    f"samples; raise it or data.block_size, or leave the source out."
                )

    @cached_property
    def counts_per_block(self) -> tuple[int, ...]:
        """Places per block and source: the weights' shares of block_size, rounded so that they add up to it."""
        weights = np.array(list(self.weights.values()), float)
        shares = weights / weights.sum() * self.block_size
        counts = np.floor(shares).astype(np.int64)
        by_remainder = np.argsort(counts - shares, kind="stable")
        counts[by_remainder[: self.block_size - counts.sum()]] += 1
        return tuple(counts.tolist())

    def has_mixture_of(self, other: "Phase") -> bool:
        """Whether both phases draw alike."""
        return replace(self, first_batch=other.first_batch) == other


class GlobalOrder:
    """The order of a run's samples.

    Attributes:
        seed: another seed is another order.
        phases: what was drawn when, by their first batches.
        skipped: batches that no step reads, as (first, last), in order.
    """

    def __init__(self, seed: int, phases: Sequence[Phase], skipped: Sequence[tuple[int, int]] = ()) -> None:
        assert phases[0].first_batch == 0
        assert list(phases) == sorted(phases, key=lambda phase: phase.first_batch)
        self.seed, self.phases, self.skipped = seed, tuple(phases), tuple(sorted(skipped))

    def batch_of(self, step: int) -> int:
        """The number of the batch that a step reads: its own, unless batches were skipped."""
        batch = step
        for first, last in self.skipped:
            batch += last - first + 1 if batch >= first else 0
        return batch

    def phase_at(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        return self.phases[self._number_of_phase(self.batch_of(step))]

    def samples(self, step: int, start: int, stop: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What stands at the places start to stop of a step's batch.

        Returns:
            For each source that has some of them, by its name: which of the places, (n,) int64 counted from start,
            and which draws of the source stand there, (n,) int64.
        """
        batch = self.batch_of(step)
        number = self._number_of_phase(batch)
        phase, before = self.phases[number], self._draws_before_phase(number)
        first = (batch - phase.first_batch) * phase.sequences_per_step
        sources, draws = self._draws(number, np.arange(first + start, first + stop))
        found = {}
        for source, name in enumerate(phase.weights):
            (places,) = np.nonzero(sources == source)
            if places.size:
                found[name] = places, draws[places] + before.get(name, 0)
        return found

    def draws_before(self, step: int) -> dict[str, int]:
        """How many windows of each source come before a step, for all sources of all phases up to there."""
        batch = self.batch_of(step)
        number = self._number_of_phase(batch)
        phase = self.phases[number]
        return self._draws_before_position(number, (batch - phase.first_batch) * phase.sequences_per_step)

    def with_phase(self, phase: Phase) -> "GlobalOrder":
        """The order that goes on with another mixture or batch size from a batch on; the same order where that
        changes nothing. Phases from that batch on, which no longer come about, are dropped."""
        kept = [earlier for earlier in self.phases if earlier.first_batch < phase.first_batch]
        if not kept:
            return GlobalOrder(self.seed, [replace(phase, first_batch=0)], self.skipped)
        phases = kept if phase.has_mixture_of(kept[-1]) else [*kept, phase]
        return GlobalOrder(self.seed, phases, self.skipped)

    def with_skipped(self, skipped: Sequence[tuple[int, int]], *, step: int) -> "GlobalOrder":
        """The order in which the steps from this one on pass over other batches.

        Raises:
            UserError: where batches before that step are skipped that were not, or not that were.
        """
        done = self.batch_of(step)
        before, now = ([pair for pair in pairs if pair[0] < done] for pairs in (self.skipped, sorted(skipped)))
        if before != now:
            past, asked = (", ".join(f"{first}-{last}" for first, last in pairs) or "none" for pairs in (before, now))
            raise UserError(
                f"data.skip ({asked}) must agree with what was skipped before batch {done} ({past}), which is past; "
                f"go on from an earlier checkpoint."
            )
        return GlobalOrder(self.seed, self.phases, skipped)

    def as_json(self) -> list[dict[str, Any]]:
        """The phases as plain data; phases_of_json reads them back."""
        return [{**asdict(phase), "weights": dict(phase.weights)} for phase in self.phases]

    def _number_of_phase(self, batch: int) -> int:
        return max(number for number, phase in enumerate(self.phases) if phase.first_batch <= batch)

    def _draws_before_phase(self, number: int) -> dict[str, int]:
        if number == 0:
            return {}
        previous = self.phases[number - 1]
        num_batches = self.phases[number].first_batch - previous.first_batch
        return self._draws_before_position(number - 1, num_batches * previous.sequences_per_step)

    def _draws_before_position(self, number: int, position: int) -> dict[str, int]:
        phase, total = self.phases[number], self._draws_before_phase(number)
        if len(phase.weights) == 1:
            (name,) = phase.weights
            return {**total, name: total.get(name, 0) + position}
        block, rest = divmod(position, phase.block_size)
        in_block = np.bincount(self._block(number, block)[0][:rest], minlength=len(phase.weights))
        counts = block * np.array(phase.counts_per_block) + in_block
        return {**total, **{name: total.get(name, 0) + int(n) for name, n in zip(phase.weights, counts, strict=True)}}

    def _draws(self, number: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per position of a phase its source, and how many positions of the phase before it have the same one."""
        phase = self.phases[number]
        if len(phase.weights) == 1:
            return np.zeros_like(positions), positions
        counts = np.array(phase.counts_per_block)
        blocks, places = np.divmod(positions, phase.block_size)
        sources, draws = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            here = blocks == block
            block_sources, block_draws = self._block(number, int(block))
            sources[here] = block_sources[places[here]]
            draws[here] = block_draws[places[here]] + block * counts[sources[here]]
        return sources, draws

    def _block(self, number: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        return _block(self.seed, number, block, self.phases[number].counts_per_block)


def phases_of_json(content: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """What GlobalOrder.as_json gave."""
    return [Phase(**phase) for phase in content]


@lru_cache(maxsize=16)
def _block(seed: int, phase: int, block: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Per place of a block its source, and how many places before it in the block have the same source."""
    size = sum(counts)
    slots = permute(np.arange(size), size, round_keys(seed, "block", phase, block))
    sources = np.searchsorted(np.cumsum(counts), slots, side="right")
    draws = np.empty_like(sources)
    for source, count in enumerate(counts):
        draws[sources == source] = np.arange(count)
    return sources, draws
