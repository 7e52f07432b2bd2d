"""Writing a split's shards, one document after the other."""

import shutil
import tempfile
from array import array
from collections.abc import Iterable
from itertools import accumulate

import numpy as np

from gpt2x.errors import UserError
from gpt2x.shards.files import token_dtype, write_shard
from gpt2x.shards.index import ShardEntry
from gpt2x.shards.records import Plan


class ShardWriter:
    """Collects a split's tokens in an unnamed file and writes a shard when it is full.

    Memory: a few bytes per document of the shard, whatever the length of shards and documents. The unnamed file is
    gone with the process, however that ends.
    """

    def __init__(self, plan: Plan, split: str, numbers: Iterable[int]) -> None:
        self.directory = plan.output_dir / split
        self.directory.mkdir(parents=True, exist_ok=True)
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
        self.spool = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115 (closed by __exit__)
        # Of the documents that are whole, and of the one that is being added.
        self.lengths, self.num_tokens, self.num_bytes = array("q"), 0, 0
        self.open_length, self.open_bytes = 0, 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.spool.close()

    def add(self, name: str, ids: np.ndarray, num_bytes: int) -> None:
        """Appends ids to the document at hand.

        Args:
            name: of the document, for messages.
            ids: (num_tokens,) of an integer type that holds whatever the tokenizer gives.
            num_bytes: of the text in UTF-8.

        Raises:
            UserError: for an id outside the vocabulary, which the cast to the shard's dtype would wrap silently.
        """
        if ids.size and (ids.max() >= self.vocab_size or ids.min() < 0):
            outside = ids[(ids < 0) | (ids >= self.vocab_size)]
            raise UserError(
                f"{name}: the tokenizer gives id {outside[0]}, outside its vocabulary of {self.vocab_size}; "
                f"repair the tokenizer or use another."
            )
        self.spool.write(ids.astype(self.dtype).data)
        self.open_length += ids.size
        self.open_bytes += num_bytes

    def end_document(self) -> None:
        """Appends the end of text. A shard ends before the document that would make it too long."""
        self.spool.write(np.array([self.eos_token_id], self.dtype).data)
        length, num_bytes = self.open_length + 1, self.open_bytes
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
        self.spool.flush()
        sha256 = write_shard(
            self.directory / name,
            # A memory map: a document longer than a shard gets one to itself, and need not fit into memory.
            tokens=np.memmap(self.spool, self.dtype, mode="r", shape=(self.num_tokens,)),
            documents=np.fromiter(accumulate(self.lengths, initial=0), np.int64, len(self.lengths) + 1),
            metadata=self.metadata,
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
        self._start_with(self.num_tokens * self.dtype.itemsize)

    def _start_with(self, position: int) -> None:
        following = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115 (closed by __exit__)
        self.spool.seek(position)
        shutil.copyfileobj(self.spool, following)
        self.spool.close()
        self.spool = following
        self.lengths, self.num_tokens, self.num_bytes = array("q"), 0, 0
