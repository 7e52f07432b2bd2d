"""Writing a split's shards, one document after the other."""

import shutil
import tempfile
from array import array
from collections.abc import Iterable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from gpt2x.errors import UserError
from gpt2x.files import make_directory, unwritable
from gpt2x.preparation.plan import Plan
from gpt2x.shards.files import DTYPES, token_dtype, write_shard
from gpt2x.shards.index import ShardEntry, split_directory


class Spool:
    """An array that grows in an unnamed file, which is gone with the process, however that ends."""

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        self.directory, self.dtype = directory, dtype
        with unwritable(directory):
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (closed by close)

    def write(self, values: np.ndarray) -> None:
        """Appends values, which the dtype must hold."""
        with unwritable(self.directory):
            self._file.write(values.astype(self.dtype, copy=False).data)

    def beginning(self, size: int) -> np.ndarray:
        """The first so many values, (size,), as a memory map: they need not fit into memory."""
        with unwritable(self.directory):
            self._file.flush()
        return np.memmap(self._file, self.dtype, mode="r", shape=(size,))

    def forget_beginning(self, size: int) -> None:
        """Keeps what stands after the first so many values."""
        with unwritable(self.directory):
            following = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115 (closed by close)
            self._file.seek(size * self.dtype.itemsize)
            shutil.copyfileobj(self._file, following)
        self.close()
        self._file = following

    def close(self) -> None:
        """Removes the file. What could not be written to it has been told, and is not needed any more."""
        with suppress(OSError):
            self._file.close()


class ShardWriter:
    """Collects a split's tokens in an unnamed file and writes a shard when it is full.

    Memory: a few bytes per document of the shard, whatever the length of shards and documents. Conversations have
    their targets in a second such file, and end as their template ends them.
    """

    def __init__(self, plan: Plan, split: str, numbers: Iterable[int]) -> None:
        self.directory = split_directory(plan.output_dir, split)
        make_directory(self.directory)
        self.numbers = iter(numbers)
        self.tokens_per_shard = plan.recipe.tokens_per_shard
        self.vocab_size, self.eos_token_id = plan.vocab_size, plan.tokenizer.eos_token_id
        self.dtype = token_dtype(self.vocab_size)
        self.metadata = {
            "format": "gpt2x.tokens.1",
            "tokenizer_fingerprint": plan.fingerprint,
            "vocab_size": str(self.vocab_size),
            "eos_token_id": str(self.eos_token_id),
        }
        self.entries: list[ShardEntry] = []
        self.spool = Spool(self.directory, self.dtype)
        self.targets = Spool(self.directory, DTYPES["U8"]) if plan.recipe.chat is not None else None
        # Of the documents that are whole, and of the one that is being added.
        self.lengths, self.num_tokens, self.num_bytes = array("q"), 0, 0
        self.open_length, self.open_bytes = 0, 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for spool in self._spools:
            spool.close()

    @property
    def _spools(self) -> list[Spool]:
        return [self.spool, *([self.targets] if self.targets is not None else [])]

    def add(self, name: str, ids: np.ndarray, num_bytes: int, *, targets: np.ndarray | None = None) -> None:
        """Appends ids to the document at hand.

        Args:
            name: of the document, for messages.
            ids: (num_tokens,) of an integer type that holds whatever the tokenizer gives.
            num_bytes: of the text in UTF-8; of what is learned of it in conversations.
            targets: (num_tokens,) bool, which ids are learned; given exactly for conversations.

        Raises:
            UserError: for an id outside the vocabulary, which the cast to the shard's dtype would wrap silently.
        """
        if ids.size and (ids.max() >= self.vocab_size or ids.min() < 0):
            outside = ids[(ids < 0) | (ids >= self.vocab_size)]
            raise UserError(
                f"{name}: the tokenizer gives id {outside[0]}, outside its vocabulary of {self.vocab_size}; "
                f"repair the tokenizer or use another."
            )
        assert (targets is None) == (self.targets is None), "conversations, and nothing else, have targets"
        self.spool.write(ids)
        if self.targets is not None and targets is not None:
            self.targets.write(targets)
        self.open_length += ids.size
        self.open_bytes += num_bytes

    def end_document(self) -> None:
        """Appends the end of text, if it is no conversation. A shard ends before the document that would make it too
        long."""
        if self.targets is None:
            self.spool.write(np.array([self.eos_token_id]))
            self.open_length += 1
        length, num_bytes = self.open_length, self.open_bytes
        self.open_length, self.open_bytes = 0, 0
        if self.lengths and self.num_tokens + length > self.tokens_per_shard:
            self._write()
        self.lengths.append(length)
        self.num_tokens += length
        self.num_bytes += num_bytes

    def finish(self) -> list[ShardEntry]:
        """Writes what is left and returns the entries of all shards."""
        if self.lengths:
            self._write()
        return self.entries

    def _write(self) -> None:
        """Writes the whole documents as a shard; what stands after them in the spool begins the next."""
        name = f"tokens_part_{next(self.numbers):05d}.safetensors"
        sha256 = write_shard(
            self.directory / name,
            tokens=self.spool.beginning(self.num_tokens),
            documents=np.fromiter(accumulate(self.lengths, initial=0), np.int64, len(self.lengths) + 1),
            metadata=self.metadata,
            targets=None if self.targets is None else self.targets.beginning(self.num_tokens),
        )
        self.entries.append(
            ShardEntry(
                file=name,
                num_tokens=self.num_tokens,
                num_documents=len(self.lengths),
                num_bytes=self.num_bytes,
                sha256=sha256,
            )
        )
        for spool in self._spools:
            spool.forget_beginning(self.num_tokens)
        self.lengths, self.num_tokens, self.num_bytes = array("q"), 0, 0
