"""Sources: where the sequences of a run come from, each in its own endless order."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2x.batches.order import epoch_windows
from gpt2x.batches.sequences import IGNORED, Sequences
from gpt2x.config import SourceSection
from gpt2x.errors import UserError
from gpt2x.shards.files import Shard, count_learned, document_begins, learned_flags
from gpt2x.shards.index import combined_sha256
from gpt2x.shards.token_sets import TokenSet, open_tokens


class Source(ABC):
    """Sequences of T tokens by the number of their draw: how many of the source were drawn before.

    What stands at a draw never changes, however often and by however many processes and threads it is asked for.

    Attributes:
        name: keys the source's order, so it must not change during a run.
        sequence_length: T.
        num_tokens: of one epoch, those that fall short of a window included; None where nobody knows.
        num_windows: of one epoch; None where nobody knows.
        fingerprint: changes with the content.
    """

    name: str
    sequence_length: int
    num_tokens: int | None
    num_windows: int | None
    fingerprint: str

    @abstractmethod
    def sequences(self, draws: np.ndarray) -> Sequences:
        """What stands at these draws, B = len(draws). A stream waits until it is there."""

    def document_begins(self, draws: np.ndarray) -> np.ndarray | None:
        """Which tokens at these draws begin a document, (len(draws), T) bool; None where ends of text tell as much."""
        return None

    @abstractmethod
    def locate(self, draw: int) -> str:
        """Where the sequence at a draw was read, for a person: epoch, file, position."""

    @abstractmethod
    def epochs(self, num_draws: int) -> float:
        """How often the source has been gone through after so many draws."""

    def require(self, num_draws: int, *, first: int | None = None) -> None:  # noqa: B027 - files are simply there
        """Waits until the draws below num_draws can be read, on every process alike.

        Args:
            num_draws: one more than the last one.
            first: the first that is needed together with them; what comes before will be released in time.

        Raises:
            UserError: where they never will be.
        """

    def release(self, num_draws: int) -> None:  # noqa: B027
        """Says that no draw below num_draws is needed any more."""

    def state(self, num_draws: int) -> dict[str, Any]:
        """What a checkpoint must hold so that another machine can go on at this draw, as JSON."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Ends what works for the source in the background."""


class ShardSource(Source):
    """The windows of a split's token shards, or of token files of other projects.

    A shard of n tokens has n // T windows, one after the other; none reaches into the next shard, and the rest of
    fewer than T tokens at a shard's end is not read. With align_documents a window begins at the first beginning of a
    document that its predecessor does not reach.
    """

    def __init__(
        self,
        tokens: TokenSet,
        sequence_length: int,
        *,
        seed: int = 0,
        name: str = "train",
        split: str = "train",
        align_documents: bool = False,
    ) -> None:
        """Opens every shard; the ids of one that was not opened before are read through once.

        Args:
            tokens: the shards.
            sequence_length: T, tokens per window.
            seed: of the order in which the windows are drawn.
            name: see Source.
            split: train or validation.
            align_documents: whether windows begin where documents begin.

        Raises:
            UserError: for a broken shard, an id outside the vocabulary, shards too short for one window, and where
                nothing is learned.
        """
        self.name, self.sequence_length, self.seed = name, sequence_length, seed
        self.shards = tokens.open_split(split)
        self.num_tokens = sum(shard.tokens.size for shard in self.shards)
        self.starts = [_document_starts(shard, sequence_length) for shard in self.shards] if align_documents else None
        sizes = [shard.tokens.size // sequence_length for shard in self.shards]
        counts = [starts.size for starts in self.starts] if self.starts else sizes
        # Shard k holds the windows first_windows[k] to first_windows[k + 1].
        self.first_windows = np.cumsum([0, *counts])
        self.num_windows: int = int(self.first_windows[-1])
        self.fingerprint = tokens.split_fingerprint(split)
        if align_documents:
            # The same shards cut in another way are other windows: what was drawn of these says nothing of those.
            self.fingerprint = combined_sha256(["aligned documents", self.fingerprint])
        self.has_targets = any(shard.targets is not None for shard in self.shards)
        if self.has_targets and not any(any(count_learned(shard, counts_first=True)) for shard in self.shards):
            raise nothing_learned(name, f"{split} documents of {tokens.location}")
        if self.num_windows == 0:
            longest = max(shard.tokens.size for shard in self.shards)
            raise UserError(
                f"{tokens.location}: no shard of {split} has the {sequence_length} tokens of data.sequence_length; "
                f"set it to {longest} or less, or give more text."
            )

    def sequences(self, draws: np.ndarray) -> Sequences:
        """What stands at these draws; labels where the shards say what is learned."""
        windows = epoch_windows(draws, self.num_windows, seed=self.seed, name=self.name)
        ids_BT = self.windows(windows)
        if not self.has_targets:
            return Sequences(ids_BT)
        is_learned_BT = self._gathered(windows, [learned_flags(shard) for shard in self.shards])
        return Sequences(ids_BT, np.where(is_learned_BT, ids_BT, IGNORED))

    def document_begins(self, draws: np.ndarray) -> np.ndarray | None:
        """By the shards' bounds where they say what is learned: in a conversation an end of text ends every turn."""
        if not self.has_targets:
            return None
        windows = epoch_windows(draws, self.num_windows, seed=self.seed, name=self.name)
        numbers = np.searchsorted(self.first_windows, windows, side="right") - 1
        starts = [self._start(n, int(window - self.first_windows[n])) for n, window in zip(numbers, windows)]
        begins = [document_begins(self.shards[n], s, s + self.sequence_length) for n, s in zip(numbers, starts)]
        return np.stack(begins)

    def locate(self, draw: int) -> str:
        """Epoch, file and position of a draw."""
        (window,) = epoch_windows(np.array([draw]), self.num_windows, seed=self.seed, name=self.name)
        number = int(np.searchsorted(self.first_windows, window, side="right") - 1)
        start = self._start(number, int(window - self.first_windows[number]))
        end = start + self.sequence_length
        return f"epoch {draw // self.num_windows}, {self.shards[number].file}, tokens {start} to {end}"

    def epochs(self, num_draws: int) -> float:
        """How often all windows have been drawn after so many draws."""
        return num_draws / self.num_windows

    def windows(self, indices: np.ndarray) -> np.ndarray:
        """The windows of these numbers, in the order of the shards, (len(indices), T) int64."""
        return self._gathered(indices, [shard.tokens for shard in self.shards])

    def _gathered(self, indices: np.ndarray, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """These windows of arrays that lie beside the shards' tokens, (len(indices), T) int64."""
        shard_numbers = np.searchsorted(self.first_windows, indices, side="right") - 1
        numbers = set(shard_numbers.tolist())
        if len(numbers) == 1:
            (number,) = numbers
            return self._windows_of(arrays, number, indices - self.first_windows[number]).astype(np.int64)
        windows = np.empty((len(indices), self.sequence_length), np.int64)
        for number in numbers:
            here = shard_numbers == number
            windows[here] = self._windows_of(arrays, number, indices[here] - self.first_windows[number])
        return windows

    def _windows_of(self, arrays: Sequence[np.ndarray], number: int, indices: np.ndarray) -> np.ndarray:
        array, length = arrays[number], self.sequence_length
        if self.starts is not None:
            return np.lib.stride_tricks.sliding_window_view(array, length)[self.starts[number][indices]]
        return array[: array.size // length * length].reshape(-1, length)[indices]

    def _start(self, number: int, window: int) -> int:
        return int(self.starts[number][window]) if self.starts is not None else window * self.sequence_length


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


def nothing_learned(name: str, documents: str) -> UserError:
    """The refusal of a source that a model would learn nothing from."""
    return UserError(
        f"source {name!r}: no token of the {documents} is learned; prepare conversations in which the assistant "
        f"speaks, or set chat.learn to all."
    )


def tokens_of(section: SourceSection) -> TokenSet:
    """The token files of a source that is not a stream.

    Raises:
        UserError: for whatever is wrong with them.
    """
    validation_path = None if section.validation_path is None else str(section.validation_path)
    return open_tokens(section.location, validation_path=validation_path, tokenizer=section.tokenizer)
