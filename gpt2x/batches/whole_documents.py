"""Windows of whole documents: none is cut, each sees itself alone, and what is left of a window is not learned."""

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby

import numpy as np

from gpt2x.batches.order import epoch_windows
from gpt2x.batches.packing import pack
from gpt2x.batches.sequences import IGNORED, Sequences
from gpt2x.batches.source import ShardSource, Source, nothing_learned
from gpt2x.config import DataSection
from gpt2x.errors import UserError
from gpt2x.shards.files import Shard, count_learned, learned_flags
from gpt2x.shards.index import combined_sha256
from gpt2x.shards.token_sets import TokenSet


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
        return sum(sum(count_learned(shard, counts_first=False)) for shard in self.shards)

    @property
    def learns_anything(self) -> bool:
        """Whether anything is predicted at all."""
        return any(any(count_learned(shard, counts_first=False)) for shard in self.shards)

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


class WholeDocumentSource(Source):
    """The documents of a split, whole, in windows that each epoch permutes."""

    def __init__(
        self, tokens: TokenSet, sequence_length: int, *, seed: int = 0, name: str = "train", split: str = "train"
    ) -> None:
        """Opens every shard and packs its documents.

        Args:
            tokens: the shards.
            sequence_length: T, tokens per window.
            seed: of the order in which the windows are drawn.
            name: see Source.
            split: train or validation.

        Raises:
            UserError: for a broken shard, an id outside the vocabulary, a document longer than T, and where nothing
                is learned.
        """
        self.name, self.sequence_length, self.seed = name, sequence_length, seed
        shards = tokens.open_split(split)
        self.num_tokens = sum(shard.tokens.size for shard in shards)
        self.packed = WholeDocuments(shards, sequence_length, eos_token_id=tokens.eos_token_id)
        self.num_windows: int = self.packed.num_windows
        # The same shards packed in another way are other windows: what was drawn of these says nothing of those.
        self.fingerprint = combined_sha256(["whole documents", tokens.split_fingerprint(split)])
        if not self.packed.learns_anything:
            raise nothing_learned(name, f"{split} documents of {tokens.location}")

    def sequences(self, draws: np.ndarray) -> Sequences:
        """The windows at these draws."""
        return self.packed.sequences(epoch_windows(draws, self.num_windows, seed=self.seed, name=self.name))

    def locate(self, draw: int) -> str:
        """Epoch, files and documents of a draw."""
        (window,) = epoch_windows(np.array([draw]), self.num_windows, seed=self.seed, name=self.name)
        return f"epoch {draw // self.num_windows}, {self.packed.locate(int(window))}"

    def epochs(self, num_draws: int) -> float:
        """How often all windows have been drawn after so many draws."""
        return num_draws / self.num_windows


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


def open_file_source(tokens: TokenSet, data: DataSection, *, seed: int, name: str) -> Source:
    """The sequences of token files, packed as the recipe says.

    Raises:
        UserError: for whatever is wrong with a file, and for too few tokens or too long documents.
    """
    if data.packing == "whole_documents":
        return WholeDocumentSource(tokens, data.sequence_length, seed=seed, name=name)
    return ShardSource(tokens, data.sequence_length, seed=seed, name=name, align_documents=data.align_documents)
