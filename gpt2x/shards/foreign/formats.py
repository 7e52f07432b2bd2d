"""Token files of other projects, recognized by their content and memory-mapped as they are.

To read another format, write what maps its file and add a line to FORMATS.
"""

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2x.errors import UserError
from gpt2x.shards.foreign.columns import first_line, map_arrow, map_parquet

Mapped = tuple[np.ndarray, Path]
"""(num_tokens,) memory map of some integer dtype, and the file it is a map of."""

SUFFIXES = (".bin", ".npy", ".ds", ".pt", ".arrow", ".parquet")
LLMC_HEADER_BYTES = 1024
LLMC_FORMATS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
"""The first number of llm.c's header -> the second, which is the version, and the dtype of the ids."""
RAW_DTYPES = (np.dtype("<u2"), np.dtype("<u4"), np.dtype("<i8"))
RAW_PROBE = 4096


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way of writing token ids."""

    name: str
    """As messages call it."""
    recognizes: Callable[[Path, bytes], bool]
    """Whether a file is of it, by its name and its first LLMC_HEADER_BYTES bytes."""
    map_tokens: Callable[[Path, int], Mapped]
    """Maps a file for a vocabulary of that size."""


def format_of(file: Path) -> Format:
    """The format of a file.

    Raises:
        UserError: for an empty file, and for one of none of the formats.
    """
    with file.open("rb") as stream:
        head = stream.read(LLMC_HEADER_BYTES)
    if not head:
        raise UserError(f"{file} is empty; delete it or copy it again.")
    for known in FORMATS:
        if known.recognizes(file, head):
            return known
    names = ", ".join(known.name for known in FORMATS)
    raise UserError(f"{file} is none of the token files that can be read ({names}); correct the path.")


def listed_documents(file: Path, num_tokens: int) -> np.ndarray | None:
    """The document bounds of datatrove's FILE.index, (num_documents + 1,) int64; None where there is no such file.

    Raises:
        UserError: where the ends do not grow or do not end where the tokens do.
    """
    index_file = _beside(file, ".index")
    if file.suffix != ".ds" or not index_file.is_file():
        return None
    size = index_file.stat().st_size
    ends = np.fromfile(index_file, np.dtype("<u8"))
    if size % 8 or not ends.size or ends[-1] != num_tokens or (ends[1:] < ends[:-1]).any():
        raise UserError(
            f"{index_file}: document ends must grow and end at {file.name}'s {num_tokens} tokens; copy both again."
        )
    return np.unique(np.concatenate([[0], ends.astype(np.int64)]))


def recorded_tokenizer(file: Path) -> str | None:
    """The name of the tokenizer that datatrove's FILE.metadata gives, None where nobody knows."""
    metadata = _datatrove_metadata(file)
    return metadata[0] if metadata and not metadata[0].startswith("Unknown Tokenizer") else None


def _map_numpy(file: Path, vocab_size: int) -> Mapped:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: numpy cannot map it ({first_line(error)}); copy or save it again.") from None
    return _checked_array(file, np.asarray(array)), file


def _checked_array(file: Path, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "iu" or array.ndim != 1 or array.size == 0:
        raise UserError(f"{file}: token ids must be one array of integers, 1-D and not empty; save it as that.")
    return array


def _map_llmc(file: Path, vocab_size: int) -> Mapped:
    """llm.c and modded-nanogpt: 256 int32, of which three say magic number, version and number of tokens."""
    header = np.fromfile(file, np.dtype("<i4"), count=LLMC_HEADER_BYTES // 4)
    magic, version, num_tokens = (int(number) for number in header[:3])
    if magic not in LLMC_FORMATS or version != LLMC_FORMATS[magic][0]:
        known = " or ".join(f"{magic} version {version}" for magic, (version, _) in LLMC_FORMATS.items())
        raise UserError(
            f"{file}: its header begins with {magic} version {version}; token files of llm.c have {known}."
        )
    dtype, found = LLMC_FORMATS[magic][1], file.stat().st_size
    expected = LLMC_HEADER_BYTES + num_tokens * dtype.itemsize
    if found != expected or num_tokens <= 0:
        raise UserError(
            f"{file}: its header says {num_tokens} tokens, hence {expected} bytes, found {found}; copy it again."
        )
    return _mapped(file, dtype, offset=LLMC_HEADER_BYTES), file


def _map_torch(file: Path, vocab_size: int) -> Mapped:
    """A tensor of token ids; weights_only, so that a pickle that is more than data is refused and never run."""
    import torch

    try:
        tensor = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError):
        raise UserError(
            f"{file}: is broken, or holds more than a tensor, which is not run; save the ids by torch.save as one 1-D "
            f"int64 tensor, in the zip format."
        ) from None
    holds_ids = isinstance(tensor, torch.Tensor) and not (tensor.is_floating_point() or tensor.is_complex())
    ids = _checked_array(file, tensor.numpy() if holds_ids else np.empty(0))
    ids.flags.writeable = False
    return ids, file


def _map_datatrove(file: Path, vocab_size: int) -> Mapped:
    """Raw ids, whose width and number stand in a .metadata beside them where that was written."""
    metadata = _datatrove_metadata(file)
    if metadata is None:
        return _map_raw(file, vocab_size)
    _, itemsize, num_tokens = metadata
    found = file.stat().st_size
    if found != itemsize * num_tokens:
        raise UserError(
            f"{file}: its .metadata says {num_tokens} tokens of {itemsize} bytes, hence {itemsize * num_tokens}, "
            f"found {found}; copy both again."
        )
    return _mapped(file, np.dtype(f"<u{itemsize}")), file


def _map_raw(file: Path, vocab_size: int) -> Mapped:
    """Ids and nothing else: nanoGPT's .bin and OLMo's .npy, uint16, or uint32 where the vocabulary needs it."""
    dtype, size = _raw_dtype(file, vocab_size), file.stat().st_size
    if size % dtype.itemsize:
        raise UserError(
            f"{file}: its {size} bytes are not a whole number of ids of {dtype.itemsize} bytes; copy it again, or "
            f"give the tokenizer that made it."
        )
    return _mapped(file, dtype), file


def _raw_dtype(file: Path, vocab_size: int) -> np.dtype:
    """The narrowest dtype that holds the vocabulary and does not read every second id as the zeros above the first.

    The latter is how uint32 and int64 files of a small vocabulary are told from uint16.
    """
    for dtype in RAW_DTYPES:
        probe = np.fromfile(file, dtype, count=RAW_PROBE)
        if vocab_size <= 2 ** (8 * dtype.itemsize) and (probe.size < 16 or probe[1::2].any()):
            return dtype
    return RAW_DTYPES[-1]


def _mapped(file: Path, dtype: np.dtype, offset: int = 0) -> np.ndarray:
    # np.asarray: slices of a memmap object cost three times those of an array.
    return np.asarray(np.memmap(file, dtype, mode="r", offset=offset))


def _datatrove_metadata(file: Path) -> tuple[str, int, int] | None:
    """Tokenizer, bytes per id and number of ids from FILE.metadata; None where there is no such file.

    Raises:
        UserError: where it is not what datatrove writes.
    """
    metadata_file = _beside(file, ".metadata")
    if file.suffix != ".ds" or not metadata_file.is_file():
        return None
    found = re.match(r"(.*)\|([24])\n(\d+)(\n|$)", metadata_file.read_text(errors="replace"))
    if found is None:
        raise UserError(
            f"{metadata_file}: must say tokenizer|bytes per id, 2 or 4, and below the number of ids; copy it again."
        )
    return found[1], int(found[2]), int(found[3])


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def _is_llmc(file: Path, head: bytes) -> bool:
    """A known magic number, or a header of another one: zeros follow its first numbers."""
    numbers = np.frombuffer(head[: len(head) // 4 * 4], np.dtype("<i4"))
    is_header = len(head) == LLMC_HEADER_BYTES and numbers[0] != 0 and not numbers[8:].any()
    return file.suffix == ".bin" and numbers.size > 0 and (int(numbers[0]) in LLMC_FORMATS or is_header)


def _is_raw(file: Path, head: bytes) -> bool:
    """Whatever is left of the names that raw files have, unless it is text."""
    is_text = len(head) > 64 and head.isascii() and all(byte >= 32 or byte in b"\t\n\r" for byte in head)
    return file.suffix in (".bin", ".npy", ".ds") and not is_text


FORMATS = (
    Format(name="numpy", recognizes=lambda file, head: head.startswith(b"\x93NUMPY"), map_tokens=_map_numpy),
    Format(
        name="torch",
        recognizes=lambda file, head: head.startswith(b"PK\x03\x04") or (file.suffix == ".pt" and head[0] == 0x80),
        map_tokens=_map_torch,
    ),
    Format(name="Parquet", recognizes=lambda file, head: head.startswith(b"PAR1"), map_tokens=map_parquet),
    Format(
        name="Arrow",
        recognizes=lambda file, head: (
            head.startswith(b"ARROW1") or (file.suffix == ".arrow" and head.startswith(b"\xff\xff\xff\xff"))
        ),
        map_tokens=map_arrow,
    ),
    Format(name="llm.c", recognizes=_is_llmc, map_tokens=_map_llmc),
    Format(name="datatrove", recognizes=lambda file, head: file.suffix == ".ds", map_tokens=_map_datatrove),
    Format(name="raw ids", recognizes=_is_raw, map_tokens=_map_raw),
)
"""Those with an unmistakable beginning first; whatever is left has none."""
