"""What one pass over a file finds, remembered: terabytes are read through the first time, not at every start.

Answers lie as small JSON files under Hugging Face's cache directory. Any number of processes may ask: one looks, the
others wait for its answer. Where nothing can be kept there, each looks for itself.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

CHUNK_BYTES = 2**23
LARGE_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What one pass over a token file found."""

    sha256: str
    """Of the file, in hexadecimal."""
    smallest_id: int
    """Below zero only where the dtype allows it and the file is wrong."""
    largest_id: int
    """Of the tokens."""


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
    """
    unknown = [file for file, tokens in mapped if _kept("scan", _read_as(file, tokens)) is None]
    size = sum(file.stat().st_size for file in unknown)
    if size >= LARGE_BYTES:
        print(f"{unknown[0].parent}: checking what is new there, once ({size / 1e9:.1f} GB)", file=sys.stderr)
    for file, tokens in mapped:
        yield _remembered_scan(file, tokens)


def remembered(question: str, of: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer of compute, which is called only where nobody has kept it.

    Args:
        question: what is asked; a part of a file name.
        of: everything that the answer depends on, as JSON gives it back.
        compute: gives the answer, also as JSON gives it back.
    """
    answer, file = _kept(question, of), _place(question, of)
    if answer is not None:
        return answer
    lock_file = file.with_suffix(".lock")
    with ExitStack() as stack:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(lock_file))
        answer = _kept(question, of)  # of the process that was faster
        if answer is None:
            answer = compute()
            with suppress(OSError):
                _keep(file, {"of": of, "answer": answer})
        with suppress(OSError):
            lock_file.unlink()  # whoever comes later finds the answer
    return answer


def _remembered_scan(file: Path, tokens: np.ndarray) -> Scan:
    return Scan(**remembered("scan", _read_as(file, tokens), lambda: asdict(_scan(file, tokens))))


def _read_as(file: Path, tokens: np.ndarray) -> dict[str, str | int]:
    return {**identity(file), "dtype": str(tokens.dtype), "num_tokens": tokens.size}


def _place(question: str, of: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / f"{question}-{key}.json"


def _kept(question: str, of: Mapping[str, Any]) -> dict[str, Any] | None:
    """The answer, or None where there is none, or not of that."""
    try:
        content = json.loads(_place(question, of).read_bytes())
        return content["answer"] if content["of"] == of else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(content))
    partial.replace(file)


def _scan(file: Path, tokens: np.ndarray) -> Scan:
    size, digest, buffer = file.stat().st_size, hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    smallest, largest, start = int(tokens[0]), int(tokens[0]), 0
    # The ids of about the same chunk, while it is in the page cache: the disk is read once.
    step = -(-tokens.size * CHUNK_BYTES // size)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            part = tokens[start : start + step]
            start += step
            if part.size:
                smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
    return Scan(sha256=digest.hexdigest(), smallest_id=smallest, largest_id=largest)
