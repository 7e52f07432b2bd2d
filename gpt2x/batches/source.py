"""Sources: windows of a fixed number of tokens, by number."""

import hashlib
from typing import Protocol

import numpy as np

from gpt2x.errors import UserError
from gpt2x.shards.index import Index


class Source(Protocol):
    """Something that holds num_windows windows of T tokens and gives any of them at once."""

    @property
    def name(self) -> str:
        """Keys the order in which the windows are drawn, so it must not change during a run."""

    @property
    def num_tokens(self) -> int:
        """All tokens, those that fall short of a window included."""

    @property
    def num_windows(self) -> int:
        """How many windows there are."""

    @property
    def fingerprint(self) -> str:
        """Changes with the content."""

    def windows(self, indices: np.ndarray) -> np.ndarray:
        """The windows of these numbers, (len(indices), T) int64."""


class ShardSource:
    """The windows of a split's token shards.

    A shard of n tokens has n // T windows, one after the other; none reaches into the next shard, and the rest of
    fewer than T tokens at a shard's end is not read.
    """

    def __init__(
        self, index: Index, split: str, sequence_length: int, *, vocab_size: int | None = None, name: str | None = None
    ) -> None:
        """Opens every shard and reads it once, to know that each id is in the vocabulary.

        Args:
            index: the shards.
            split: train or validation.
            sequence_length: T, tokens per window.
            vocab_size: the model's; by default the tokenizer's.
            name: see Source; by default the split's.

        Raises:
            UserError: for a broken shard, an id outside the vocabulary, and shards too short for one window.
        """
        self.name, self.sequence_length = name or split, sequence_length
        self.shards = index.open_split(split)
        for shard in self.shards:
            shard.check_token_ids(vocab_size or index.vocab_size)
        self.num_tokens = sum(shard.tokens.size for shard in self.shards)
        # Shard k holds the windows first_windows[k] to first_windows[k + 1].
        self.first_windows = np.cumsum([0] + [shard.tokens.size // sequence_length for shard in self.shards])
        self.num_windows = int(self.first_windows[-1])
        if self.num_windows == 0:
            longest = max(shard.tokens.size for shard in self.shards)
            raise UserError(
                f"{index.directory / split}: no shard has the {sequence_length} tokens of data.sequence_length; "
                f"set it to {longest} or less, or give more text."
            )
        hashes = [entry.sha256 for entry in index.splits[split]]
        self.fingerprint = hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    def windows(self, indices: np.ndarray) -> np.ndarray:
        """The windows of these numbers, (len(indices), T) int64."""
        windows = np.empty((len(indices), self.sequence_length), np.int64)
        shard_numbers = np.searchsorted(self.first_windows, indices, side="right") - 1
        for number in np.unique(shard_numbers):
            here = shard_numbers == number
            windows[here] = self._windows_of(number, indices[here] - self.first_windows[number])
        return windows

    def _windows_of(self, shard_number: int, indices: np.ndarray) -> np.ndarray:
        tokens, length = self.shards[shard_number].tokens, self.sequence_length
        return tokens[: tokens.size // length * length].reshape(-1, length)[indices]
