"""What the tasks of a preparation have finished, on disk, and who works where."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from gpt2x.errors import UserError
from gpt2x.files import DamagedError, locked, make_directory, read_json, write_file
from gpt2x.shards.index import INDEX_FILE, ShardEntryContent


class TaskRecord(TypedDict):
    """What a finished task made, and of what."""

    made_of: dict[str, Any]
    plan: str
    """Identity of the recorded sources; a task of others does not count."""
    splits: dict[str, list[ShardEntryContent]]
    dropped: dict[str, int]
    sha256: dict[str, str]
    """Of the corpus' files that this task took it of, by their names."""


class _Content(TypedDict):
    record: TaskRecord
    sha256: str


def tasks_dir(output_dir: Path) -> Path:
    """Where the records are until the index is written."""
    return output_dir / "tasks"


@contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Has a directory of token shards to itself, as long as something is to be done there; who comes second waits."""
    lock_file = output_dir / "preparation.lock"
    is_complete = (output_dir / INDEX_FILE).is_file() and not tasks_dir(output_dir).exists()
    if is_complete and not os.path.lexists(lock_file):
        yield
        return
    make_directory(output_dir)
    with locked(lock_file, waits=True):
        yield


@contextmanager
def alone_with_task(output_dir: Path, task: int) -> Iterator[None]:
    """Is the only process that works on a task."""
    make_directory(tasks_dir(output_dir))
    with locked(_record_file(output_dir, task).with_suffix(".lock"), waits=True):
        yield


def recorded(output_dir: Path, task: int, *, plan: str) -> TaskRecord | None:
    """What a finished task made, or None where it is not finished or was another plan's."""
    record = _read(_record_file(output_dir, task))
    return record if record is not None and record["plan"] == plan else None


def record_task(output_dir: Path, task: int, record: TaskRecord) -> None:
    """Records a finished task, whose shards are on the disk."""
    content = _Content(record=record, sha256=_sha256(record))
    write_file(_record_file(output_dir, task), json.dumps(content).encode())


def forget_other_preparations(output_dir: Path, made_of: dict[str, Any]) -> None:
    """A preparation that was changed half-way must not be finished with the shards of before.

    Raises:
        UserError: where it was the tokenizer that changed, which nobody asks for and every part would be lost by.
    """
    for file in sorted(tasks_dir(output_dir).glob("task_*.json")):
        if (record := _read(file)) is None:
            continue
        before, now = record["made_of"]["tokenizer_fingerprint"], made_of["tokenizer_fingerprint"]
        if before != now:
            raise UserError(
                f"'{output_dir}' holds parts made with another tokenizer ({before[:8]}, now {now[:8]}); restore "
                f"the tokenizer, or delete that directory."
            )
        if record["made_of"] != made_of:
            file.unlink(missing_ok=True)


def _record_file(output_dir: Path, task: int) -> Path:
    return tasks_dir(output_dir) / f"task_{task:05d}.json"


def _read(file: Path) -> TaskRecord | None:
    """None also for one that another task has just forgotten, and for one that counts for nothing: of a bit that has
    flipped the index would keep the result for ever."""
    try:
        content = read_json(file, _Content)
    except DamagedError:
        return None
    return content["record"] if content["sha256"] == _sha256(content["record"]) else None


def _sha256(record: TaskRecord) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
