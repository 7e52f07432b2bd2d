"""A split read as one stream, in windows that overlap by one token."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from gpt2x.batches.packing import document_positions
from gpt2x.batches.sequences import IGNORED, Sequences
from gpt2x.shards.files import Shard, count_learned, document_begins, learned_flags


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
        return sum(sum(count_learned(shard, counts_first=not self.masks_documents)) for shard in self.shards)

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
        ids = self._stream(start, stop, _tokens, self.eos_token_id).astype(np.int64)
        inputs = np.full(self.sequence_length, self.eos_token_id)
        inputs[: ids.size] = ids
        labels = np.full(self.sequence_length, IGNORED)
        labels[1 : ids.size] = ids[1:]
        begins = inputs == self.eos_token_id
        if self.has_targets:
            labels[: ids.size][self._stream(start, stop, _learned, 0) == 0] = IGNORED
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


def _tokens(shard: Shard, start: int, stop: int) -> np.ndarray:
    return shard.tokens[start:stop]


def _learned(shard: Shard, start: int, stop: int) -> np.ndarray:
    return learned_flags(shard)[start:stop]
