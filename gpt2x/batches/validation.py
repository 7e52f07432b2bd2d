"""Validation batches: every token of a split that is learned is predicted exactly once.

Where documents stand alone, which those of whole_documents and conversations that are masked do, a document's first
token is not predicted even if it is learned: nothing of its own stands before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpt2x.batches.order import permute, round_keys
from gpt2x.batches.source import nothing_learned
from gpt2x.batches.whole_documents import WholeDocuments
from gpt2x.batches.windows import IGNORED, Sequences, StridedWindows, joined
from gpt2x.errors import UserError
from gpt2x.shards.files import Shard
from gpt2x.shards.token_sets import TokenSet


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out documents of a source.

    Attributes:
        shards: their tokens.
        num_bytes: their UTF-8 bytes, of conversations those that are learned, for bits per byte.
        eos_token_id: the id between documents.
    """

    shards: Sequence[Shard]
    num_bytes: int
    eos_token_id: int

    @classmethod
    def of(cls, tokens: TokenSet, split: str = "validation") -> "HeldOut":
        """A token set's held-out split.

        Raises:
            UserError: where it has none, and for whatever is wrong with a file.
        """
        shards = tokens.open_split(split)
        return cls(shards=shards, num_bytes=tokens.num_bytes(split), eos_token_id=tokens.eos_token_id)

    def windows(self, sequence_length: int, *, packing: str) -> StridedWindows | WholeDocuments:
        """The windows in which the documents are predicted, for a packing of the data section.

        Raises:
            UserError: for a document that must be whole and does not fit.
        """
        if packing == "whole_documents":
            return WholeDocuments(self.shards, sequence_length, eos_token_id=self.eos_token_id)
        return StridedWindows(
            self.shards,
            sequence_length,
            eos_token_id=self.eos_token_id,
            masks_documents=packing == "documents",
        )


class ValidationBatches:
    """Batches over the held-out documents of one or more sources, whose losses add up to those of the whole.

    The windows of each source hold nothing of another one's, and do not depend on batch_size and num_processes. A
    document that stands alone is not asked for its first token, whose bytes count all the same.
    Batches all have the same shape, and processes the same number of them: what is left over is filled up with
    ignored labels.

    Attributes:
        num_targets: tokens that are predicted, over all processes.
        num_bytes: UTF-8 bytes of each source's documents by its name, for bits per byte.
    """

    def __init__(
        self,
        held_out: HeldOut | Mapping[str, HeldOut],
        *,
        sequence_length: int,
        batch_size: int,
        rank: int = 0,
        num_processes: int = 1,
        packing: str = "continuous",
    ) -> None:
        """Reads no tokens yet; what is learned of them is counted.

        Args:
            held_out: the documents, by the names of their sources where they have one.
            sequence_length: T.
            batch_size: sequences per process and forward pass.
            rank: this process among num_processes.
            num_processes: processes that share the work.
            packing: as in training: what tokens see, and whether documents are cut.

        Raises:
            UserError: for a sequence_length below 2, a document that must be whole and does not fit, and a source of
                which nothing is learned.
        """
        if sequence_length < 2:
            raise UserError(f"data.sequence_length ({sequence_length}) must be at least 2 to predict a token.")
        sources = {"validation": held_out} if isinstance(held_out, HeldOut) else held_out
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.rank, self.num_processes, self.masks_documents = rank, num_processes, packing != "continuous"
        self.num_bytes = {name: source.num_bytes for name, source in sources.items()}
        self._held_out = tuple(sources.values())
        self._windows = [source.windows(sequence_length, packing=packing) for source in self._held_out]
        for name, windows in zip(sources, self._windows):
            if not windows.num_targets:
                raise nothing_learned(name, "held-out documents")
        self.num_targets = sum(windows.num_targets for windows in self._windows)
        self._first_windows = np.cumsum([0, *(windows.num_windows for windows in self._windows)])

    def __len__(self) -> int:
        """Batches per process."""
        return -(-int(self._first_windows[-1]) // (self.batch_size * self.num_processes))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches: input_ids and labels, (batch_size, T) int64, on the CPU; position_ids where
        documents are masked; and of several sources sources, (batch_size,) int64, the number of each row's.

        Counting labels counts targets: one that the shift leaves out is -100.
        """
        for number in range(len(self)):
            first = (number * self.num_processes + self.rank) * self.batch_size
            windows = np.arange(first, first + self.batch_size)
            sources = np.searchsorted(self._first_windows, windows, side="right") - 1
            ids, labels, position_ids = self._sequences(windows, sources)
            batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
            if position_ids is not None:
                batch["position_ids"] = torch.from_numpy(position_ids)
            if len(self._windows) > 1:
                batch["sources"] = torch.from_numpy(sources.clip(max=len(self._windows) - 1))
            yield batch

    def _sequences(self, windows: np.ndarray, sources: np.ndarray) -> Sequences:
        """The windows of these numbers, counted over all sources; beyond the last one everything is ignored."""
        parts = []
        for source in np.unique(sources).tolist():
            (rows,) = np.nonzero(sources == source)
            is_beyond = source == len(self._windows)
            inside = windows[rows] - self._first_windows[source]
            found = self._filler(rows.size) if is_beyond else self._windows[source].sequences(inside)
            parts.append((rows, found))
        return joined(parts)

    def _filler(self, num_rows: int) -> Sequences:
        """Rows of ends of text without labels, with what the others have."""
        ids = np.full((num_rows, self.sequence_length), self._held_out[0].eos_token_id, np.int64)
        positions = np.tile(np.arange(self.sequence_length), (num_rows, 1)) if self.masks_documents else None
        return Sequences(ids, np.full_like(ids, IGNORED), positions)

    def document_beginnings(self, num_documents: int, length: int) -> list[list[int]]:
        """The beginnings of some documents, always the same ones, as prompts for samples.

        Documents of more than so many tokens are preferred; the end of text is never part of a prompt. A conversation
        goes up to the first token that is learned, however long it is, so that the sample answers.

        These are ids. Who decodes them and encodes the text again, as samples do, makes a real special token of one
        that a document spells, which in training stays text.

        Args:
            num_documents: how many; fewer where the split has fewer.
            length: tokens of each, at most.
        """
        shards = [shard for source in self._held_out for shard in source.shards]
        lengths = np.concatenate([np.diff(shard.documents) - 1 for shard in shards])
        chosen = permute(np.arange(lengths.size), lengths.size, round_keys("document beginnings"))
        chosen = np.concatenate([chosen[lengths[chosen] > length], chosen[lengths[chosen] <= length]])
        first_documents = np.cumsum([0, *(shard.documents.size - 1 for shard in shards)])
        numbers = np.searchsorted(first_documents, chosen[:num_documents], side="right") - 1
        found = zip(numbers.tolist(), (chosen[:num_documents] - first_documents[numbers]).tolist())
        end = self._held_out[0].eos_token_id
        return [_beginning(shards[number], document, length, eos_token_id=end) for number, document in found]


def _beginning(shard: Shard, document: int, length: int, *, eos_token_id: int) -> list[int]:
    """A document's ids without its end of text, if it has one, so many of them; or up to what is learned."""
    start, end = shard.documents[document : document + 2]
    learned = np.flatnonzero(shard.targets[start:end]) if shard.targets is not None else np.zeros(1)
    if learned.size and learned[0] > 0:
        return shard.tokens[start : start + learned[0]].tolist()
    ends = end > start and shard.tokens[end - 1] == eos_token_id
    return shard.tokens[start : end - 1 if ends else end][:length].tolist()
