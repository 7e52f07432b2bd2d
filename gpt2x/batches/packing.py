"""Documents packed into sequences, each seeing itself alone."""

from bisect import bisect_left, insort
from collections import deque

import numpy as np


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
