"""Sequences of token ids, and the windows of shards that hold them: one after the other, or overlapping by one.

Windows of whole documents are in gpt2x.batches.whole_documents.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from gpt2x.shards.files import Shard, count_learned, document_begins, learned_flags

IGNORED = -100


class Sequences(NamedTuple):
    """B sequences of T tokens."""

    ids: np.ndarray
    """Token ids, (B, T) int64."""
    labels: np.ndarray | None = None
    """The same ids where they are learned and IGNORED elsewhere, (B, T) int64, unshifted; None where all of them
    are learned."""
    position_ids: np.ndarray | None = None
    """(B, T) int64, beginning again at every document; None where documents are not told apart."""


def joined(parts: Sequence[tuple[np.ndarray, Sequences]]) -> Sequences:
    """The sequences of several sources as those of one; what a part lacks is filled in.

    Args:
        parts: for each, at which rows its sequences go, (n,) integers, ascending and together 0..B-1.
    """
    if len(parts) == 1:
        return parts[0][1]
    shape = sum(len(rows) for rows, _ in parts), parts[0][1].ids.shape[1]
    has_labels = any(part.labels is not None for _, part in parts)
    has_positions = any(part.position_ids is not None for _, part in parts)
    ids_BT = np.empty(shape, np.int64)
    labels_BT = np.empty(shape, np.int64) if has_labels else None
    positions_BT = np.empty(shape, np.int64) if has_positions else None
    for rows, part in parts:
        ids_BT[rows] = part.ids
        if labels_BT is not None:
            labels_BT[rows] = part.ids if part.labels is None else part.labels
        if positions_BT is not None:
            positions_BT[rows] = np.arange(shape[1]) if part.position_ids is None else part.position_ids
    return Sequences(ids_BT, labels_BT, positions_BT)


def document_positions(begins_BT: np.ndarray) -> np.ndarray:
    """Position ids that begin again at every document; the model masks what stands before.

    Args:
        begins_BT: which tokens begin a document, (B, T) bool. Where documents are told apart by the end of text, it
            is the one in front of a document, from which its first token is predicted; its last token predicts the
            end of text that begins the next one. So every token is trained on, and none sees another document.

    Returns:
        (B, T) int64.
    """
    places_T = np.arange(begins_BT.shape[1])
    return places_T - np.maximum.accumulate(np.where(begins_BT, places_T, 0), axis=1)


def num_learned(shards: Sequence[Shard], *, counts_first: bool) -> int:
    """How many tokens are learned; see count_learned. Takes one pass over the targets."""
    return sum(sum(count_learned(shard, counts_first=counts_first)) for shard in shards)


def is_anything_learned(shards: Sequence[Shard], *, counts_first: bool) -> bool:
    """Whether any token is learned; reads no further than the first."""
    return any(any(count_learned(shard, counts_first=counts_first)) for shard in shards)


class ConsecutiveWindows:
    """Windows of T tokens, one after the other; none reaches into the next shard, and the rest of fewer than T tokens
    at a shard's end is in none.

    With align_documents a window begins at the first beginning of a document that its predecessor does not reach.

    Attributes:
        shards: the split.
        sequence_length: T.
        num_windows: how many windows there are.
    """

    def __init__(self, shards: Sequence[Shard], sequence_length: int, *, align_documents: bool = False) -> None:
        """Reads no token."""
        self.shards, self.sequence_length = shards, sequence_length
        self._starts = [_document_starts(shard, sequence_length) for shard in shards] if align_documents else None
        sizes = [shard.tokens.size // sequence_length for shard in shards]
        counts = [starts.size for starts in self._starts] if self._starts else sizes
        # Shard k holds the windows first_windows[k] to first_windows[k + 1].
        self._first_windows = np.cumsum([0, *counts])
        self.num_windows = int(self._first_windows[-1])
        self.has_targets = any(shard.targets is not None for shard in shards)

    @property
    def learns_anything(self) -> bool:
        """Whether anything is learned at all."""
        return not self.has_targets or is_anything_learned(self.shards, counts_first=True)

    def sequences(self, windows: np.ndarray) -> Sequences:
        """The windows of these numbers, (B,) integers; labels where the shards say what is learned."""
        ids_BT = self._gathered(windows, [shard.tokens for shard in self.shards])
        if not self.has_targets:
            return Sequences(ids_BT)
        is_learned_BT = self._gathered(windows, [learned_flags(shard) for shard in self.shards])
        return Sequences(ids_BT, np.where(is_learned_BT, ids_BT, IGNORED))

    def document_begins(self, windows: np.ndarray) -> np.ndarray | None:
        """Which tokens of windows begin a document, (B, T) bool, by the shards' bounds where they say what is learned:
        in a conversation an end of text ends every turn. None where ends of text tell as much."""
        if not self.has_targets:
            return None
        places = [self._place(window) for window in windows.tolist()]
        return np.stack([document_begins(shard, start, start + self.sequence_length) for shard, start in places])

    def locate(self, window: int) -> str:
        """File and position of a window, for a person."""
        shard, start = self._place(window)
        return f"{shard.file}, tokens {start} to {start + self.sequence_length}"

    def _place(self, window: int) -> tuple[Shard, int]:
        """A window's shard, and the number of its first token there."""
        number = int(np.searchsorted(self._first_windows, window, side="right") - 1)
        inside = window - int(self._first_windows[number])
        return self.shards[number], int(
            self._starts[number][inside]
        ) if self._starts else inside * self.sequence_length

    def _gathered(self, windows: np.ndarray, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """These windows of arrays that lie beside the shards' tokens, (len(windows), T) int64."""
        shard_numbers = np.searchsorted(self._first_windows, windows, side="right") - 1
        numbers = set(shard_numbers.tolist())
        if len(numbers) == 1:
            (number,) = numbers
            return self._windows_of(arrays, number, windows - self._first_windows[number]).astype(np.int64)
        found = np.empty((len(windows), self.sequence_length), np.int64)
        for number in numbers:
            here = shard_numbers == number
            found[here] = self._windows_of(arrays, number, windows[here] - self._first_windows[number])
        return found

    def _windows_of(self, arrays: Sequence[np.ndarray], number: int, windows: np.ndarray) -> np.ndarray:
        array, length = arrays[number], self.sequence_length
        if self._starts is not None:
            return np.lib.stride_tricks.sliding_window_view(array, length)[self._starts[number][windows]]
        return array[: array.size // length * length].reshape(-1, length)[windows]


def _document_starts(shard: Shard, length: int) -> np.ndarray:
    """Where the windows of a shard begin that begin where documents begin, int64: eight bytes per window."""
    documents, end = shard.documents, 0
    starts: list[int] = []
    while True:
        position = int(np.searchsorted(documents[:-1], end))
        if position >= documents.size - 1 or documents[position] + length > shard.tokens.size:
            return np.array(starts, np.int64)
        starts.append(int(documents[position]))
        end = starts[-1] + length


class StridedWindows:
    """Windows of T tokens at a stride of T - 1: the last token of a window is the first of the next.

    The stream has one end of text in front. The model shifts the labels, so the first token of a window is context
    only, and each token of the split, the ends of text included, is a target once, if it is learned.

    Attributes:
        shards: the split.
        sequence_length: T.
        num_windows: how many windows there are.
    """

    def __init__(
        self, shards: Sequence[Shard], sequence_length: int, *, eos_token_id: int, masks_documents: bool
    ) -> None:
        """Reads nothing yet.

        Args:
            shards: the split.
            sequence_length: T, at least 2.
            eos_token_id: the id between documents.
            masks_documents: whether tokens see their own document only; documents of shards that say what is learned
                are told apart by their bounds, others by the end of text.
        """
        self.shards, self.sequence_length, self.eos_token_id = shards, sequence_length, eos_token_id
        self.has_targets = any(shard.targets is not None for shard in shards)
        self.masks_documents = masks_documents
        self._first_tokens = np.cumsum([0] + [shard.tokens.size for shard in shards])
        self.num_windows = -(-int(self._first_tokens[-1]) // (sequence_length - 1))

    @cached_property
    def num_targets(self) -> int:
        """How many tokens are predicted."""
        if not self.has_targets:
            return int(self._first_tokens[-1])
        return num_learned(self.shards, counts_first=not self.masks_documents)

    def sequences(self, windows: np.ndarray) -> Sequences:
        """The windows of these numbers. labels[:, 0] is IGNORED, so that counting labels counts targets.

        Args:
            windows: (B,) integers in 0..num_windows-1.
        """
        parts = [self._window(window) for window in windows.tolist()]
        ids, labels, begins = (np.stack(arrays) for arrays in zip(*parts, strict=True))
        return Sequences(ids, labels, document_positions(begins) if self.masks_documents else None)

    def _window(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, labels and which tokens begin a document, (T,) each; what the last window lacks is ends of text."""
        start = number * (self.sequence_length - 1)
        stop = start + self.sequence_length
        ids = self._stream(start, stop, lambda shard, a, b: shard.tokens[a:b], self.eos_token_id).astype(np.int64)
        inputs = np.full(self.sequence_length, self.eos_token_id)
        inputs[: ids.size] = ids
        labels = np.full(self.sequence_length, IGNORED)
        labels[1 : ids.size] = ids[1:]
        begins = inputs == self.eos_token_id
        if self.has_targets:
            labels[: ids.size][self._stream(start, stop, lambda shard, a, b: learned_flags(shard)[a:b], 0) == 0] = (
                IGNORED
            )
            begins[: ids.size] = self._stream(start, stop, document_begins, 1)
            if self.masks_documents:
                labels[begins] = IGNORED
        return inputs, labels, begins

    def _stream(
        self, start: int, stop: int, read: Callable[[Shard, int, int], np.ndarray], in_front: int
    ) -> np.ndarray:
        """What is read of the stream with something in front, as far as it goes."""
        parts = [np.array([in_front])] if start == 0 else []
        for first, shard in zip(self._first_tokens + 1, self.shards):
            here = max(start - first, 0), min(stop - first, shard.tokens.size)
            if here[0] < here[1]:
                parts.append(read(shard, *here))
        return np.concatenate(parts)
