"""Shard files: safetensors with the token ids and where each document starts, written durably, read by memory map.
Those of conversations also say which tokens are learned.

The format is https://github.com/huggingface/safetensors: eight bytes of header length, a JSON header, the arrays. It
is written and opened here rather than through the library, because the library loads whole arrays and does not
promise the order of its metadata, and a preparation that is run again must give the same bytes.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpt2x.errors import UserError

DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
}
REMEDY = "delete the directory and prepare the data again, or copy the file again"
MAX_HEADER_BYTES = 1_000_000
TOKENS_PER_CHUNK = 2**22


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype of a shard that holds every id below vocab_size."""
    return DTYPES["U16"] if vocab_size <= 2**16 else DTYPES["U32"]


def write_durably(file: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Writes a file so that a crash leaves either all of it or nothing under its name.

    Returns:
        The sha256 of the content, in hexadecimal.
    """
    partial, digest = file.with_name(file.name + ".tmp"), hashlib.sha256()
    try:
        with partial.open("wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
                digest.update(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)  # what has failed half-way
    sync(file.parent)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shard(
    file: Path,
    *,
    tokens: np.ndarray,
    documents: np.ndarray,
    metadata: dict[str, str],
    targets: np.ndarray | None = None,
) -> str:
    """Writes one shard.

    Args:
        file: where to.
        tokens: (num_tokens,) uint16 or uint32.
        documents: (num_documents + 1,) int64, where each document starts, and the end.
        metadata: goes into the header; must not depend on when or where the shard is made.
        targets: (num_tokens,) uint8, 1 where a token is learned; None where all of them are.

    Returns:
        The sha256 of the file.
    """
    # The wider dtype first, so that every array is aligned.
    arrays = {"documents": documents.astype(DTYPES["I64"], copy=False), "tokens": tokens}
    if targets is not None:
        arrays["targets"] = targets
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name, array in arrays.items():
        dtype = next(key for key, value in DTYPES.items() if value == array.dtype)
        header[name] = {"dtype": dtype, "shape": [array.size], "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    buffers = [np.ascontiguousarray(array).data.cast("B") for array in arrays.values()]
    return write_durably(file, [struct.pack("<Q", len(text)), text, *buffers])


@dataclass(frozen=True, kw_only=True)
class Shard:
    """An open file of token ids, ours or another project's. Its arrays are memory maps: nothing is read before it is
    used.

    Attributes:
        file: where it is.
        tokens: (num_tokens,) of some integer dtype; uint16 or uint32 in shards of ours.
        bounds: (num_documents + 1,) int64, where each document starts, and the end; None where the file does not say.
        targets: (num_tokens,) uint8, 1 where a token is learned; None where all of them are.
        eos_token_id: what documents end with; needed where bounds is None.
        id_range: the smallest and the largest id, where they are known.
        metadata: the header's.
    """

    file: Path
    tokens: np.ndarray
    bounds: np.ndarray | None = None
    targets: np.ndarray | None = None
    eos_token_id: int | None = None
    id_range: tuple[int, int] | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @cached_property
    def documents(self) -> np.ndarray:
        """(num_documents + 1,) int64, where each document starts, and the end.

        Where the file does not say, a document ends with each end of text, which takes one pass over the file. Then
        the last one may lack its end; and a file whose ends of text stand before the documents begins with an empty
        one.
        """
        if self.bounds is not None:
            return self.bounds
        starts = range(0, self.tokens.size, TOKENS_PER_CHUNK)
        found = [
            np.flatnonzero(self.tokens[start : start + TOKENS_PER_CHUNK] == self.eos_token_id) + start + 1
            for start in starts
        ]
        return np.unique(np.concatenate([[0], *found, [self.tokens.size]])).astype(np.int64, copy=False)

    def check_token_ids(self, vocab_size: int) -> None:
        """Refuses a shard with an id that a vocabulary of this size does not have.

        Raises:
            UserError: names the file, the first such position and its id.
        """
        smallest, largest = self.id_range or (int(self.tokens.min()), int(self.tokens.max()))
        if smallest >= 0 and largest < vocab_size:
            return
        for start in range(0, self.tokens.size, TOKENS_PER_CHUNK):
            part = self.tokens[start : start + TOKENS_PER_CHUNK]
            for offset in np.flatnonzero((part < 0) | (part >= vocab_size))[:1]:
                raise UserError(
                    f"{self.file}: token id {part[offset]} at position {start + offset} is outside the vocabulary of "
                    f"{vocab_size}; use the tokenizer that the ids were made with, or prepare the data again."
                )


def open_shard(file: Path) -> Shard:
    """Opens a shard and checks that its size, dtypes and document bounds are what its header says.

    Raises:
        UserError: names the file, what was expected and what was found.
    """
    header, data_start = _read_header(file)
    arrays = {name: _mapped(file, header, name, data_start) for name in _array_names(header)}
    tokens, starts, targets = arrays["tokens"], arrays["documents"], arrays.get("targets")
    if tokens.dtype not in (DTYPES["U16"], DTYPES["U32"]) or starts.dtype != DTYPES["I64"]:
        raise UserError(f"{file}: tokens must be U16 or U32 and documents I64; {REMEDY}.")
    if targets is not None and (targets.dtype != DTYPES["U8"] or targets.size != tokens.size):
        raise UserError(f"{file}: targets must be U8, one for each of the {tokens.size} tokens; {REMEDY}.")
    if starts.size < 2 or starts[0] != 0 or starts[-1] != tokens.size or (np.diff(starts) <= 0).any():
        raise UserError(f"{file}: documents must start at 0, grow and end at {tokens.size}; {REMEDY}.")
    return Shard(file=file, tokens=tokens, bounds=starts, targets=targets, metadata=header.get("__metadata__", {}))


def _array_names(header: dict) -> list[str]:
    return ["tokens", "documents", *(["targets"] if "targets" in header else [])]


def _read_header(file: Path) -> tuple[dict, int]:
    """The header of a safetensors file and where its arrays begin; the file's size is checked against it."""
    if not file.is_file():
        raise UserError(f"{file} is missing; {REMEDY}.")
    found = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))[0]
        if length > min(found - 8, MAX_HEADER_BYTES):
            raise UserError(f"{file}: its {found} bytes end inside the header, or it is no token shard; {REMEDY}.")
        try:
            header = json.loads(stream.read(length))
            expected = 8 + length + max(int(header[name]["data_offsets"][1]) for name in _array_names(header))
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{file}: its header is not that of a token shard; {REMEDY}.") from None
    if found != expected:
        raise UserError(f"{file}: expected {expected} bytes, found {found}; {REMEDY}.")
    return header, 8 + length


def _mapped(file: Path, header: dict, name: str, data_start: int) -> np.ndarray:
    try:
        dtype, (size,), (start, end) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
        fits = size > 0 and start >= 0 and end - start == size * DTYPES[dtype].itemsize
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{file}: {header.get(name)} does not describe an array of {name}; {REMEDY}.")
    # np.asarray: slices of a memmap object cost three times those of an array.
    return np.asarray(np.memmap(file, DTYPES[dtype], mode="r", offset=data_start + start, shape=(size,)))
