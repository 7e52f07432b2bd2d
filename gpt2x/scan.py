"""What one pass over a file finds, remembered: terabytes are read through the first time, not at every start.

Answers lie as small JSON files under Hugging Face's cache directory. Any number of processes may ask: one looks, the
others wait for its answer. Where nothing can be kept there, each looks for itself.

A file is known by its path, size and time of last change, which a bit that flips on the disk leaves as they are. So
the pass also takes a sha256 of every block, and whoever comes later compares some blocks, drawn anew each time, with
what they were: of up to SAMPLE_BYTES in all, each of them. Deleting the answers lets everything be read again.
"""

import hashlib
import json
import random
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from huggingface_hub import constants
from typing_extensions import TypedDict

from gpt2x.errors import UserError
from gpt2x.files import DamagedError, UnwritableError, locked, make_directory, opened, read_json, write_file

CHUNK_BYTES = 2**23
LARGE_BYTES = 2**30
BLOCK_BYTES = 2**22
# What is compared at every start; takes fifty milliseconds where it is in the page cache.
SAMPLE_BYTES = 2**26
# A file of a terabyte has a quarter of a million blocks of 20 bytes.
MAX_ANSWER_BYTES = 2**28


class Scan(TypedDict):
    """What one pass over a token file found."""

    sha256: str
    """Of the file, in hexadecimal."""
    smallest_id: int
    """Below zero only where the dtype allows it and the file is wrong."""
    largest_id: int
    """Of the tokens."""
    blocks: list[str]
    """The beginning of the sha256 of each BLOCK_BYTES of the file, in hexadecimal."""


Answer = TypeVar("Answer")


def cache_dir() -> Path:
    """Where answers are kept; looked up at each call, so that a process may set another place."""
    return Path(constants.HF_HOME) / "gpt2x"


def identity(file: Path) -> dict[str, str | int]:
    """What tells a file from what was there before: path, size and time of the last change."""
    status = file.stat()
    return {"path": str(file.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def scan_all(mapped: Sequence[tuple[Path, np.ndarray]]) -> Iterator[Scan]:
    """The sha256 and the range of ids of files, by one pass over the bytes of those that are not known from before.

    Args:
        mapped: files, each with the tokens, (num_tokens,), that are memory-mapped from it.

    Raises:
        UserError: for a file that is known, and of which a block is not what it was; see the module.
    """
    of = {file: {**identity(file), "dtype": str(tokens.dtype), "num_tokens": tokens.size} for file, tokens in mapped}
    known = {file: found for file in of if (found := _kept("scan", of[file], Scan))}
    unknown = [file for file in of if file not in known]
    size = sum(file.stat().st_size for file in unknown)
    if size >= LARGE_BYTES:
        print(f"{unknown[0].parent}: checking what is new there, once ({size / 1e9:.1f} GB)", file=sys.stderr)
    _compare_some_blocks({file: found["blocks"] for file, found in known.items()})
    for file, tokens in mapped:
        yield known.get(file) or remembered("scan", of[file], partial(_scan, file, tokens), shape=Scan)


def remembered(question: str, of: Mapping[str, Any], compute: Callable[[], Answer], *, shape: type[Answer]) -> Answer:
    """The answer of compute, which is called only where nobody has kept it.

    Args:
        question: what is asked; a part of a file name.
        of: everything that the answer depends on, as JSON gives it back.
        compute: gives the answer, also as JSON gives it back.
        shape: of the answer: a TypedDict without optional keys.
    """
    answer, file = _kept(question, of, shape), _place(question, of)
    if answer is not None:
        return answer
    with ExitStack() as stack:
        with suppress(UnwritableError):  # then each looks for itself
            make_directory(file.parent)
            stack.enter_context(locked(file.with_suffix(".lock"), waits=True))
        answer = _kept(question, of, shape)  # of the process that was faster
        if answer is None:
            answer = compute()
            with suppress(UnwritableError):
                write_file(file, json.dumps({"of": of, "answer": answer}).encode())
    return answer


def _place(question: str, of: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / f"{question}-{key}.json"


def _kept(question: str, of: Mapping[str, Any], shape: type[Answer]) -> Answer | None:
    """The answer, or None where there is none, a damaged one, or not of that."""
    try:
        content = read_json(_place(question, of), _content_shape(cast(Any, shape)), max_bytes=MAX_ANSWER_BYTES)
    except DamagedError:
        return None
    return content["answer"] if content["of"] == of else None


@lru_cache
def _content_shape(shape: Any) -> Any:
    return TypedDict("_Content", {"of": dict[str, Any], "answer": shape})  # type: ignore[operator]


def _scan(file: Path, tokens: np.ndarray) -> Scan:
    size, digest, buffer = file.stat().st_size, hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    smallest, largest, start, blocks = int(tokens[0]), int(tokens[0]), 0, list[str]()
    # The ids of about the same chunk, while it is in the page cache: the disk is read once.
    step = -(-tokens.size * CHUNK_BYTES // size)
    with file.open("rb") as stream:  # buffered, so that only the last chunk is shorter
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            blocks += [_block(buffer[at : min(at + BLOCK_BYTES, count)]) for at in range(0, count, BLOCK_BYTES)]
            part = tokens[start : start + step]
            start += step
            if part.size:
                smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
    return Scan(sha256=digest.hexdigest(), smallest_id=smallest, largest_id=largest, blocks=blocks)


def _block(content: memoryview | bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _compare_some_blocks(known: Mapping[Path, Sequence[str]]) -> None:
    """Other blocks in every process and at every start, as many as SAMPLE_BYTES hold."""
    files, ends = list(known), list(accumulate(len(blocks) for blocks in known.values()))
    total = ends[-1] if ends else 0
    for chosen in sorted(random.SystemRandom().sample(range(total), min(total, SAMPLE_BYTES // BLOCK_BYTES))):
        file = files[bisect_right(ends, chosen)]
        _compare_block(file, chosen - ends[bisect_right(ends, chosen)] + len(known[file]), known[file])


def _compare_block(file: Path, number: int, blocks: Sequence[str]) -> None:
    try:
        with opened(file) as stream:
            stream.seek(number * BLOCK_BYTES)
            found = _block(stream.read(BLOCK_BYTES))
    except DamagedError as error:
        raise UserError(f"{error}; copy the file again.") from None
    if found != blocks[number]:
        raise UserError(
            f"{file}: its content has changed, though neither its size nor its time has: what stands from byte "
            f"{number * BLOCK_BYTES:,} on is not what was read there before; copy the file again, or delete it and "
            f"make it again."
        )
