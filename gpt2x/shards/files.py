"""Shard files: safetensors with the token ids and where each document starts, written durably, read by memory map.
Those of conversations also say which tokens are learned.

The format is https://github.com/huggingface/safetensors: eight bytes of header length, a JSON header, the arrays. It
is written and opened here rather than through the library, because the library loads whole arrays and does not
promise the order of its metadata, and a preparation that is run again must give the same bytes.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from gpt2x.errors import UserError
from gpt2x.files import DamagedError, opened, parse_json, write_file

DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
}
REMEDY = "delete the directory and prepare the data again, or copy the file again"
MAX_HEADER_BYTES = 1_000_000
TOKENS_PER_CHUNK = 2**22


class _Array(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


_Header = TypedDict(
    "_Header",
    {
        "__metadata__": NotRequired[dict[str, str]],
        "tokens": _Array,
        "documents": _Array,
        "targets": NotRequired[_Array],
    },
)


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype of a shard that holds every id below vocab_size."""
    return DTYPES["U16"] if vocab_size <= 2**16 else DTYPES["U32"]


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
    return write_file(file, [struct.pack("<Q", len(text)), text, *buffers])


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


def learned_flags(shard: Shard) -> np.ndarray:
    """(num_tokens,) of 0 and 1: the shard's targets, or where it has none ones that take no memory."""
    return np.broadcast_to(np.uint8(1), shard.tokens.shape) if shard.targets is None else shard.targets


def document_begins(shard: Shard, start: int, stop: int) -> np.ndarray:
    """Which of the tokens from start to stop begin a document, (stop - start,) bool."""
    begins = np.zeros(stop - start, bool)
    first, end = np.searchsorted(shard.documents[:-1], [start, stop])
    begins[shard.documents[first:end] - start] = True
    return begins


def count_learned(shard: Shard, *, counts_first: bool) -> Iterator[int]:
    """Chunk by chunk of a shard how many of its tokens are learned.

    Args:
        shard: read as far as the result is.
        counts_first: whether the first token of a document counts, before which nothing of its own stands.
    """
    for start in range(0, shard.tokens.size, TOKENS_PER_CHUNK):
        stop = min(start + TOKENS_PER_CHUNK, shard.tokens.size)
        is_learned = learned_flags(shard)[start:stop] != 0
        if not counts_first:
            is_learned &= ~document_begins(shard, start, stop)
        yield int(np.count_nonzero(is_learned))


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


def _array_names(header: _Header) -> list[str]:
    return ["tokens", "documents", *(["targets"] if "targets" in header else [])]


def _read_header(file: Path) -> tuple[_Header, int]:
    """The header of a safetensors file and where its arrays begin; the file's size is checked against it."""
    try:
        with opened(file) as stream:
            found = os.fstat(stream.fileno()).st_size
            length = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))[0]
            if length > min(found - 8, MAX_HEADER_BYTES):
                raise UserError(f"{file}: its {found} bytes end inside the header, or it is no token shard; {REMEDY}.")
            content = stream.read(length)
    except DamagedError as error:
        raise UserError(f"{error}; {REMEDY}.") from None
    try:
        header = parse_json(content, _Header, where=str(file))
        expected = 8 + length + max(_offsets(header, name)[1] for name in _array_names(header))
    except (DamagedError, ValueError):
        raise UserError(f"{file}: its header is not that of a token shard; {REMEDY}.") from None
    if found != expected:
        raise UserError(f"{file}: expected {expected} bytes, found {found}; {REMEDY}.")
    return header, 8 + length


def _offsets(header: _Header, name: str) -> tuple[int, int]:
    start, end = header[name]["data_offsets"]  # type: ignore[literal-required]
    return start, end


def _mapped(file: Path, header: _Header, name: str, data_start: int) -> np.ndarray:
    array: _Array = header[name]  # type: ignore[literal-required]
    dtype, (start, end) = DTYPES.get(array["dtype"]), _offsets(header, name)
    size = array["shape"][0] if len(array["shape"]) == 1 else 0
    if dtype is None or size <= 0 or start < 0 or end - start != size * dtype.itemsize:
        raise UserError(f"{file}: {array} does not describe an array of {name}; {REMEDY}.")
    # np.asarray: slices of a memmap object cost three times those of an array.
    return np.asarray(np.memmap(file, dtype, mode="r", offset=data_start + start, shape=(size,)))
