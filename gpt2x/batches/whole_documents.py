"""Windows of whole documents: none is cut, each sees itself alone, and what is left of a window is not learned."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby

import numpy as np

from gpt2x.batches.windows import IGNORED, Sequences, is_anything_learned, num_learned
from gpt2x.errors import UserError
from gpt2x.shards.files import Shard, learned_flags


class WholeDocuments:
    """The documents of a split, packed into windows of T tokens by their lengths.

    The windows depend on nothing but the shards and T. They take some four bytes of memory per document and eight per
    window; the tokens stay in the files.

    Attributes:
        shards: where the documents are.
        sequence_length: T.
        num_windows: how many there are.
    """

    def __init__(self, shards: Sequence[Shard], sequence_length: int, *, eos_token_id: int) -> None:
        """Packs the documents, of which nothing but the lengths is read.

        Args:
            shards: of one split.
            sequence_length: T.
            eos_token_id: fills what is left of a window.

        Raises:
            UserError: for a document of more than T tokens.
        """
        self.shards, self.sequence_length, self.eos_token_id = shards, sequence_length, eos_token_id
        for shard in shards:
            _check_lengths(shard, sequence_length)
        lengths = np.concatenate([np.diff(shard.documents) for shard in shards])
        # Window w holds the documents self._documents[self._ends[w] : self._ends[w + 1]], counted over all shards.
        self._documents, self._ends = pack(lengths, sequence_length)
        self._first_documents = np.cumsum([0, *(shard.documents.size - 1 for shard in shards)])
        self.num_windows: int = self._ends.size - 1

    @cached_property
    def num_targets(self) -> int:
        """How many tokens are predicted; takes one pass over the targets."""
        return num_learned(self.shards, counts_first=False)

    @property
    def learns_anything(self) -> bool:
        """Whether anything is predicted at all: of single tokens nothing is, whatever is learned of them."""
        return is_anything_learned(self.shards, counts_first=False)

    def sequences(self, windows: np.ndarray) -> Sequences:
        """The windows of these numbers, with their labels and their positions.

        A document's first token is no label, since nothing of its own stands before it. What is left of a window
        is a document of ends of text without labels.

        Args:
            windows: (B,) integers in 0..num_windows-1.
        """
        shape = len(windows), self.sequence_length
        rows_D, documents_D = self._documents_of(windows)
        shards_D, starts_D, lengths_D = self._places_of(documents_D)
        offsets_D = np.cumsum(lengths_D) - lengths_D
        first_offsets_B = offsets_D[np.searchsorted(rows_D, np.arange(len(windows)))]
        # Token n of all N that are read is number within_N of its document and goes to places_N of the batch.
        tokens_N = np.arange(lengths_D.sum())
        within_N = tokens_N - np.repeat(offsets_D, lengths_D)
        places_N = tokens_N + np.repeat(rows_D * self.sequence_length - first_offsets_B[rows_D], lengths_D)
        ids_N, is_learned_N = self._read(shards_D, lengths_D, tokens_N + np.repeat(starts_D - offsets_D, lengths_D))
        used_B = np.bincount(rows_D, lengths_D, minlength=len(windows)).astype(np.int64)
        position_ids_BT = np.arange(self.sequence_length) - used_B[:, None]
        ids_BT, labels_BT = np.full(shape, self.eos_token_id, np.int64), np.full(shape, IGNORED, np.int64)
        ids_BT.flat[places_N] = ids_N
        position_ids_BT.flat[places_N] = within_N
        labels_BT.flat[places_N] = np.where(is_learned_N & (within_N > 0), ids_N, IGNORED)
        return Sequences(ids_BT, labels_BT, position_ids_BT)

    def document_begins(self, windows: np.ndarray) -> None:
        """Nothing: the positions of `sequences` tell the documents apart."""

    def locate(self, window: int) -> str:
        """The files and the numbers of the documents of a window, for a person."""
        _, documents = self._documents_of(np.array([window]))
        shard_of = self._shards_of(documents)
        found = []
        for number, group in groupby(zip(shard_of.tolist(), documents.tolist()), key=lambda pair: pair[0]):
            numbers = ", ".join(str(document - self._first_documents[number]) for _, document in group)
            found.append(f"{self.shards[number].file}, documents {numbers}")
        return "; ".join(found)

    def _documents_of(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents of windows, one window after the other: in which of the windows each is, and its number."""
        first_B, counts_B = self._ends[windows], self._ends[windows + 1] - self._ends[windows]
        rows_D = np.repeat(np.arange(len(windows)), counts_B)
        before_B = np.cumsum(counts_B) - counts_B
        numbers_D = self._documents[np.arange(rows_D.size) + (first_B - before_B)[rows_D]]
        return rows_D, numbers_D.astype(np.int64)

    def _shards_of(self, documents_D: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_documents, documents_D, side="right") - 1

    def _places_of(self, documents_D: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of documents the numbers of their shards, where they start there, and their lengths."""
        shards_D = self._shards_of(documents_D)
        bounds_D2 = np.empty((documents_D.size, 2), np.int64)
        for number in np.unique(shards_D):
            here = shards_D == number
            inside = documents_D[here] - self._first_documents[number]
            bounds = self.shards[number].documents
            bounds_D2[here] = np.stack([bounds[inside], bounds[inside + 1]], axis=1)
        return shards_D, bounds_D2[:, 0], bounds_D2[:, 1] - bounds_D2[:, 0]

    def _read(
        self, shards_D: np.ndarray, lengths_D: np.ndarray, tokens_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of documents, (N,) int64, and which of them are learned, (N,) bool; tokens_N is where they stand."""
        ids_N, is_learned_N = np.empty(tokens_N.size, np.int64), np.empty(tokens_N.size, bool)
        for number in np.unique(shards_D):
            here_N = np.repeat(shards_D == number, lengths_D)
            ids_N[here_N] = self.shards[number].tokens[tokens_N[here_N]]
            is_learned_N[here_N] = learned_flags(self.shards[number])[tokens_N[here_N]]
        return ids_N, is_learned_N


def _check_lengths(shard: Shard, sequence_length: int) -> None:
    lengths = np.diff(shard.documents)
    for number in np.flatnonzero(lengths > sequence_length)[:1]:
        if shard.targets is None:
            remedy = "set data.packing to documents, which cuts them"
        else:
            remedy = f"prepare them again with chat.max_length {sequence_length}"
        raise UserError(
            f"{shard.file}: document {number} has {lengths[number]} tokens, and data.sequence_length "
            f"({sequence_length}) must hold it whole; {remedy}, or set {lengths.max()} if the model takes that many."
        )


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts every document into a window, uncut, by best-fit decreasing.

    The longest first, each goes where it leaves the least room (arXiv:2404.10830). Documents of one
    length and windows of one room are dealt with together, so it takes at most as many rounds as there are documents,
    and few where many have the same length. Runs go on by the numbers of windows: they must stay what they are.

    Args:
        lengths: of the documents, (num_documents,) integers in 1..capacity.
        capacity: of a window.

    Returns:
        The numbers of the documents, window after window and ascending within each, (num_documents,) unsigned; and
        where each window's begin there, and the end, (num_windows + 1,) int64.
    """
    windows, num_windows = _best_fit_decreasing(lengths, capacity)
    documents = np.argsort(windows, kind="stable").astype(np.min_scalar_type(max(lengths.size - 1, 0)))
    counts = np.bincount(windows, minlength=num_windows)
    return documents, np.concatenate([[0], np.cumsum(counts)])


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Each document's window, (num_documents,) int64, and how many windows there are."""
    order = np.argsort(-lengths, kind="stable")
    windows, rooms, num_windows = np.empty(lengths.size, np.int64), _Rooms(), 0
    sizes, starts = np.unique(-lengths[order], return_index=True)
    for length, start, stop in zip((-sizes).tolist(), starts.tolist(), [*starts[1:].tolist(), lengths.size]):
        while start < stop:
            room, found = rooms.pop(length) or (capacity, None)
            per_window = room // length
            if found is None:
                found = np.arange(num_windows, num_windows + -(-(stop - start) // per_window))
                num_windows += found.size
            taken = min(stop - start, per_window * found.size)
            full, rest = divmod(taken, per_window)
            touched = full + bool(rest)
            windows[order[start : start + taken]] = np.repeat(found[:touched], per_window)[:taken]
            rooms.put(room, found[touched:])
            rooms.put(room - rest * length, found[full:touched])
            rooms.put(room - per_window * length, found[:full])
            start += taken
    return windows, num_windows


class _Rooms:
    """Windows by the room that is left in them."""

    def __init__(self) -> None:
        self._windows: dict[int, deque[np.ndarray]] = {}
        self._ascending: list[int] = []

    def pop(self, length: int) -> tuple[int, np.ndarray] | None:
        """Some windows of the least room that is enough, and that room; None where there are none."""
        place = bisect_left(self._ascending, length)
        if place == len(self._ascending):
            return None
        room = self._ascending[place]
        found = self._windows[room].popleft()
        if not self._windows[room]:
            del self._windows[room], self._ascending[place]
        return room, found

    def put(self, room: int, windows: np.ndarray) -> None:
        """Adds windows with that room, to be taken after the others of it."""
        if not windows.size or not room:
            return
        if room not in self._windows:
            self._windows[room] = deque()
            insort(self._ascending, room)
        self._windows[room].append(windows)
