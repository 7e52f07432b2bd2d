"""The sums of what a run, a preparation or an export has left: `python tests/same_bytes.py DIRECTORY ...`.

Two runs of the same code are the same bytes where these sums are equal: the sha256 of every file after what the clock
says, versions and absolute paths are taken out of JSON and YAML. Pictures, which hold the clock's axis, and locks are
left out.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

CLOCK = {"elapsed_s", "step_s", "tokens_per_s", "data/waited_s", "mtime_ns", "date", "since"}
VERSIONS = {"versions", "transformers_version", "torch", "python", "devices", "environment"}
LEFT_OUT = {".png", ".svg", ".lock", ".lease"}


def sums(directory: Path) -> dict[str, str]:
    """The sum of each file by its path in the directory."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.suffix not in LEFT_OUT)
    return {path.relative_to(directory).as_posix(): sum_of(path) for path in files}


def sum_of(file: Path) -> str:
    """The sha256 of a file, without what may differ between two runs of the same code."""
    readers = {".json": json.loads, ".yaml": yaml.safe_load, ".jsonl": _lines}
    content = file.read_bytes()
    if file.suffix in readers:
        content = json.dumps(_timeless(readers[file.suffix](content.decode())), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if key not in CLOCK | VERSIONS}
        # A manifest sums up files as they are; those that hold the clock have a sum of their own here.
        return {key: _timeless(item) for key, item in kept.items() if not _describes_text(key, item)}
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    return value


def _describes_text(name: str, facts: Any) -> bool:
    is_fact = isinstance(facts, Mapping) and "sha256" in facts
    return is_fact and PurePath(name).suffix in (".json", ".jsonl", ".yaml")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for name, digest in sums(Path(argument)).items():
            print(f"{digest}  {name}")
