"""Writing token shards: one, or those of a split, document after document, in memory that does not grow with them."""

import shutil
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2x.errors import UserError
from gpt2x.files import make_directory, unwritable
from gpt2x.shards.files import DTYPES, token_dtype, write_shard
from gpt2x.shards.index import ShardEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a shard says of the tokenizer that made it."""

    size: int
    """Every id is below it."""
    eos_token_id: int
    """The end of text."""
    fingerprint: str
    """Of the tokenizer."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast") -> "Vocabulary":
        """That of a tokenizer; the fingerprint of a large one takes a fifth of a second."""
        from gpt2x.tokenizers.bpe import tokenizer_fingerprint, vocabulary_size  # imports transformers

        return cls(
            size=vocabulary_size(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            fingerprint=tokenizer_fingerprint(tokenizer),
        )


def write_documents(
    file: Path,
    vocabulary: Vocabulary,
    *,
    tokens: np.ndarray,
    starts: np.ndarray,
    num_bytes: int,
    targets: np.ndarray | None = None,
) -> ShardEntry:
    """Writes a shard.

    Args:
        file: where to.
        vocabulary: that the ids are of.
        tokens: (num_tokens,) of the vocabulary's token_dtype.
        starts: (num_documents + 1,) int64, where each document starts, and the end.
        num_bytes: of the documents in UTF-8.
        targets: (num_tokens,) uint8, 1 where a token is learned; None where all of them are.
    """
    metadata = {
        "format": "gpt2x.tokens.1",
        "tokenizer_fingerprint": vocabulary.fingerprint,
        "vocab_size": str(vocabulary.size),
        "eos_token_id": str(vocabulary.eos_token_id),
    }
    sha256 = write_shard(file, tokens=tokens, documents=starts, metadata=metadata, targets=targets)
    return ShardEntry(
        file=file.name,
        num_tokens=tokens.size,
        num_documents=starts.size - 1,
        num_bytes=num_bytes,
        sha256=sha256,
    )


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

    def __init__(
        self,
        directory: Path,
        vocabulary: Vocabulary,
        *,
        tokens_per_shard: int,
        numbers: Iterator[int],
        has_targets: bool = False,
    ) -> None:
        """Begins with no document.

        Args:
            directory: of the split; it need not be there yet.
            vocabulary: that the ids are of.
            tokens_per_shard: at most, unless a single document has more.
            numbers: of the shards, one after the other.
            has_targets: whether the documents are conversations.
        """
        make_directory(directory)
        self.directory, self.vocabulary = directory, vocabulary
        self.tokens_per_shard, self.numbers = tokens_per_shard, numbers
        self.entries: list[ShardEntry] = []
        dtypes = [token_dtype(vocabulary.size), *([DTYPES["U8"]] if has_targets else [])]
        self.has_targets, self.spools = has_targets, [Spool(directory, dtype) for dtype in dtypes]
        # Of the documents that are whole, and of the one that is being added.
        self.lengths, self.num_tokens, self.num_bytes = array("q"), 0, 0
        self.open_length, self.open_bytes = 0, 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for spool in self.spools:
            spool.close()

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
        if ids.size and (ids.max() >= self.vocabulary.size or ids.min() < 0):
            outside = ids[(ids < 0) | (ids >= self.vocabulary.size)]
            raise UserError(
                f"{name}: the tokenizer gives id {outside[0]}, outside its vocabulary of {self.vocabulary.size}; "
                f"repair the tokenizer or use another."
            )
        for spool, values in zip(self.spools, [ids] if targets is None else [ids, targets], strict=True):
            spool.write(values)
        self.open_length += ids.size
        self.open_bytes += num_bytes

    def end_document(self) -> None:
        """Appends the end of text, if it is no conversation. A shard ends before the document that would make it too
        long."""
        if not self.has_targets:
            self.spools[0].write(np.array([self.vocabulary.eos_token_id]))
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
        tokens, *targets = (spool.beginning(self.num_tokens) for spool in self.spools)
        entry = write_documents(
            self.directory / f"tokens_part_{next(self.numbers):05d}.safetensors",
            self.vocabulary,
            tokens=tokens,
            starts=np.fromiter(accumulate(self.lengths, initial=0), np.int64, len(self.lengths) + 1),
            num_bytes=self.num_bytes,
            targets=targets[0] if targets else None,
        )
        self.entries.append(entry)
        for spool in self.spools:
            spool.forget_beginning(self.num_tokens)
        self.lengths, self.num_tokens, self.num_bytes = array("q"), 0, 0
