"""What may become of a file: flipped bits, cuts, other kinds, deep or mistyped JSON; every choice is seeded."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRONG = [None, True, -1, 2**70, 1.5, "x", "", "١٣", [], {}, [[]], {"a": 1}, "../x", float("nan")]


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes() or b"\0")  # the lock is an empty file
    for _ in range(rng.randint(1, 3)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice([0, 1, rng.randint(0, len(content)), max(len(content) - 1, 0)])])


def grow(file: Path, rng: random.Random) -> None:
    with file.open("ab") as stream:
        stream.write(rng.choice([b"\0", b"\n{}", b"}", b" " * 1000, b"\xff\xfe", rng.randbytes(64)]))


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def directory(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()
    if rng.random() < 0.5:
        (file / "in").write_text("")


def link(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to(rng.choice(["nowhere", "/dev/zero", "/dev/full", file.name, "/", "/etc/hostname"]))


def fifo(file: Path, rng: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def deep(file: Path, rng: random.Random) -> None:
    levels = rng.choice([150, 1_000, 200_000])
    file.write_text(rng.choice(["[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels, "[" * levels]))


def wrong_type(file: Path, rng: random.Random) -> None:
    """Another value somewhere in the JSON, or in a line of it, or in a safetensors header; else other bytes."""
    content = file.read_bytes()
    try:
        file.write_text(json.dumps(_with_another_value(json.loads(content), rng)))
    except ValueError:
        lines, end = content.split(b"\n"), 8 + int.from_bytes(content[:8], "little")
        number = rng.randrange(len(lines))
        try:
            if end < len(content):
                header = json.dumps(_with_another_value(json.loads(content[8:end]), rng)).encode()
                content = len(header).to_bytes(8, "little") + header + content[end:]
            else:
                lines[number] = json.dumps(_with_another_value(json.loads(lines[number]), rng)).encode()
                content = b"\n".join(lines)
        except ValueError:
            content = rng.randbytes(len(content))
        file.write_bytes(content)


def _with_another_value(value: Any, rng: random.Random) -> Any:
    """A copy of which one part, drawn at random, is something else or gone."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(WRONG)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy = value.copy()
    if rng.random() < 0.2:
        del copy[key]
    else:
        copy[key] = _with_another_value(value[key], rng)
    return copy


KINDS: list[Callable[[Path, random.Random], None]] = [
    *(flip, cut, grow, delete, directory, link, fifo, deep, wrong_type, wrong_type, wrong_type)
]


def mutate(file: Path, rng: random.Random) -> str:
    """Does something to a file that is there, drawn at random; its name."""
    kind = rng.choice(KINDS)
    kind(file, rng)
    return kind.__name__


def restore(pristine: Path, place: Path) -> None:
    """Puts a directory back as it was, whatever lies there."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(pristine, place, symlinks=True)
