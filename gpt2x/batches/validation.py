"""Validation batches: every token of a split is predicted exactly once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpt2x.batches.order import permute, round_keys
from gpt2x.batches.packing import document_positions
from gpt2x.errors import UserError
from gpt2x.shards.files import Shard
from gpt2x.shards.tokens import TokenSet

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out documents of one or more sources.

    Attributes:
        shards: their tokens.
        num_bytes: their UTF-8 bytes, for bits per byte.
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

    @classmethod
    def joined(cls, parts: Sequence["HeldOut"]) -> "HeldOut":
        """Those of several sources, one after the other; they share a tokenizer."""
        return cls(
            shards=[shard for part in parts for shard in part.shards],
            num_bytes=sum(part.num_bytes for part in parts),
            eos_token_id=parts[0].eos_token_id,
        )


class ValidationBatches:
    """Batches over a split whose losses add up to that of the whole split.

    The split's shards are read as one stream with one end of text in front, cut into windows of T tokens at a stride
    of T - 1: the last token of a window is the first of the next. The model shifts the labels, so the first token of
    a window is context only, and each token of the split, the ends of text included, is a target once.

    The windows do not depend on batch_size and num_processes. Batches all have the same shape, and processes the same
    number of them: what is left over is filled up with ignored labels.

    Attributes:
        num_targets: tokens that are predicted, over all processes.
        num_bytes: UTF-8 bytes of the documents, for bits per byte.
    """

    def __init__(
        self,
        held_out: HeldOut,
        *,
        sequence_length: int,
        batch_size: int,
        rank: int = 0,
        num_processes: int = 1,
        masks_documents: bool = False,
    ) -> None:
        """Reads nothing yet.

        Args:
            held_out: the documents.
            sequence_length: T.
            batch_size: sequences per process and forward pass.
            rank: this process among num_processes.
            num_processes: processes that share the work.
            masks_documents: whether tokens see their own document only, as in training.

        Raises:
            UserError: for a sequence_length below 2.
        """
        if sequence_length < 2:
            raise UserError(f"data.sequence_length ({sequence_length}) must be at least 2 to predict a token.")
        self.shards, self.eos_token_id, self.num_bytes = held_out.shards, held_out.eos_token_id, held_out.num_bytes
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.rank, self.num_processes, self.masks_documents = rank, num_processes, masks_documents
        self.first_tokens = np.cumsum([0] + [shard.tokens.size for shard in self.shards])
        self.num_targets = int(self.first_tokens[-1])

    def __len__(self) -> int:
        """Batches per process."""
        per_pass = (self.sequence_length - 1) * self.batch_size * self.num_processes
        return -(-self.num_targets // per_pass)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches: input_ids and labels, (batch_size, T) int64, on the CPU; and position_ids where
        documents are masked.

        labels[:, 0] is ignored by the shift; it is -100, so that counting labels counts targets.
        """
        for number in range(len(self)):
            first = (number * self.num_processes + self.rank) * self.batch_size
            windows = [self._window(window) for window in range(first, first + self.batch_size)]
            inputs, labels = (np.stack(part) for part in zip(*windows))
            batch = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
            if self.masks_documents:
                batch["position_ids"] = torch.from_numpy(document_positions(inputs, self.eos_token_id))
            yield batch

    def _window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A window's input ids and labels, (T,) int64 each; beyond the last one everything is ignored."""
        start = number * (self.sequence_length - 1)
        ids = self._stream(start, start + self.sequence_length)
        inputs = np.full(self.sequence_length, self.eos_token_id)
        inputs[: ids.size] = ids
        labels = np.full(self.sequence_length, IGNORED)
        labels[1 : ids.size] = ids[1:]
        return inputs, labels

    def _stream(self, start: int, stop: int) -> np.ndarray:
        """Ids of the stream with the end of text in front, as far as it goes, int64."""
        parts = [np.array([self.eos_token_id])] if start == 0 else []
        for first, shard in zip(self.first_tokens + 1, self.shards):
            parts.append(shard.tokens[max(start - first, 0) : max(stop - first, 0)].astype(np.int64))
        return np.concatenate(parts)

    def document_beginnings(self, num_documents: int, length: int) -> list[list[int]]:
        """The first tokens of some documents, always the same ones, as prompts for samples.

        Documents that go on after those tokens are preferred; the end of text is never part of a prompt.

        Args:
            num_documents: how many; fewer where the split has fewer.
            length: tokens of each, at most.
        """
        lengths = np.concatenate([np.diff(shard.documents) - 1 for shard in self.shards])
        chosen = permute(np.arange(lengths.size), lengths.size, round_keys("document beginnings"))
        chosen = np.concatenate([chosen[lengths[chosen] > length], chosen[lengths[chosen] <= length]])
        return [self._document(number)[:length].tolist() for number in chosen[:num_documents]]

    def _document(self, number: int) -> np.ndarray:
        """A document's ids without its end of text."""
        shard, number = self._shard_of_document(number)
        return shard.tokens[shard.documents[number] : shard.documents[number + 1] - 1]

    def _shard_of_document(self, number: int) -> tuple[Shard, int]:
        for shard in self.shards:
            if number < shard.documents.size - 1:
                return shard, number
            number -= shard.documents.size - 1
        raise IndexError(number)
