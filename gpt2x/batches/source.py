"""Sources: where the sequences of a run come from, each in its own endless order."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from gpt2x.batches.order import epoch_windows
from gpt2x.batches.whole_documents import WholeDocuments
from gpt2x.batches.windows import ConsecutiveWindows, Sequences
from gpt2x.config import DataSection, SourceSection
from gpt2x.errors import UserError
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
    """The windows of a split's token shards, or of token files of other projects, which each epoch permutes.

    Attributes:
        tokens: the shards of all splits.
        windows: of the shards of this split, cut as the packing says.
    """

    def __init__(
        self,
        tokens: TokenSet,
        sequence_length: int,
        *,
        seed: int = 0,
        name: str = "train",
        split: str = "train",
        packing: str = "continuous",
        align_documents: bool = False,
    ) -> None:
        """Opens every shard; the ids of one that was not opened before are read through once.

        Args:
            tokens: the shards.
            sequence_length: T, tokens per window.
            seed: of the order in which the windows are drawn.
            name: see Source.
            split: train or validation.
            packing: of the data section; with whole_documents no document is cut.
            align_documents: whether other windows begin where documents begin.

        Raises:
            UserError: for a broken shard, an id outside the vocabulary, shards too short for one window, a document
                that must be whole and is longer than T, and where nothing is learned.
        """
        self.tokens, self.name, self.sequence_length, self.seed = tokens, name, sequence_length, seed
        shards, self.fingerprint = tokens.open_split(split), tokens.split_fingerprint(split)
        self.num_tokens = sum(shard.tokens.size for shard in shards)
        self.windows: ConsecutiveWindows | WholeDocuments
        if packing == "whole_documents":
            self.windows = WholeDocuments(shards, sequence_length, eos_token_id=tokens.eos_token_id)
        else:
            self.windows = ConsecutiveWindows(shards, sequence_length, align_documents=align_documents)
        if packing == "whole_documents" or align_documents:
            # The same shards cut in another way are other windows: what was drawn of these says nothing of those.
            cut = "whole documents" if packing == "whole_documents" else "aligned documents"
            self.fingerprint = combined_sha256([cut, self.fingerprint])
        if not self.windows.learns_anything:
            raise nothing_learned(name, f"{split} documents of {tokens.location}")
        self.num_windows: int = self.windows.num_windows
        if self.num_windows == 0:
            longest = max(shard.tokens.size for shard in shards)
            raise UserError(
                f"{tokens.location}: no shard of {split} has the {sequence_length} tokens of data.sequence_length; "
                f"set it to {longest} or less, or give more text."
            )

    def sequences(self, draws: np.ndarray) -> Sequences:
        """What stands at these draws; labels where the shards say what is learned."""
        return self.windows.sequences(self._drawn(draws))

    def document_begins(self, draws: np.ndarray) -> np.ndarray | None:
        """See Source."""
        return self.windows.document_begins(self._drawn(draws))

    def locate(self, draw: int) -> str:
        """Epoch, file and place of a draw."""
        (window,) = self._drawn(np.array([draw])).tolist()
        return f"epoch {draw // self.num_windows}, {self.windows.locate(window)}"

    def epochs(self, num_draws: int) -> float:
        """How often all windows have been drawn after so many draws."""
        return num_draws / self.num_windows

    def _drawn(self, draws: np.ndarray) -> np.ndarray:
        return epoch_windows(draws, self.num_windows, seed=self.seed, name=self.name)


def nothing_learned(name: str, documents: str) -> UserError:
    """The refusal of a source that a model would learn nothing from."""
    return UserError(
        f"source {name!r}: no token of the {documents} is learned; prepare conversations in which the assistant "
        f"speaks, or set chat.learn to all."
    )


def open_files(section: SourceSection, data: DataSection, *, seed: int) -> ShardSource:
    """Opens the token files of a source that is not a stream, cut as the recipe says.

    Raises:
        UserError: for whatever is wrong with a file, and for too few tokens or too long documents.
    """
    validation_path = None if section.validation_path is None else str(section.validation_path)
    return ShardSource(
        open_tokens(section.location, validation_path=validation_path, tokenizer=section.tokenizer),
        data.sequence_length,
        seed=seed,
        name=section.key,
        packing=data.packing,
        align_documents=data.align_documents,
    )
