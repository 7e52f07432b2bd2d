"""What a corpus was made of: its files as a preparation began, and whether they still are that.

sources.json lies beside the index. It has the recipe and, for every file of the corpus, name, size, time of the last
change, and the sha256, which a task takes of a file right after it has read it. Files are the same where size and
time are, else where the sha256 is.

Of a dataset of the Hub it has the commit, which all tasks read; later starts do not ask the Hub whether there is a
newer one. Nothing is known of what a URL names.
"""

import hashlib
import json
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from gpt2x.errors import UserError
from gpt2x.files import DamagedError, opened, read_json, write_file
from gpt2x.scan import remembered

SOURCES_FILE = "sources.json"
# A corpus may have millions of files.
MAX_BYTES = 2**31


class SourceFile(TypedDict):
    """A file of a corpus at some time."""

    name: str
    size: int
    mtime_ns: int
    sha256: NotRequired[str]


class SourceRecord(TypedDict):
    """The content of sources.json."""

    made_of: dict[str, Any]
    tokenizer: str
    files: list[SourceFile]
    revision: NotRequired[str | None]


class OtherDataError(UserError):
    """A directory holds data of another recipe or of other texts.

    Attributes:
        difference: the message without the remedy.
    """

    def __init__(self, difference: str) -> None:
        self.difference = difference
        super().__init__(f"{difference}; set another output_dir, or delete that directory.")


def look_at(files: Mapping[str, Path]) -> list[SourceFile]:
    """The files as they are now, by their names.

    Raises:
        UserError: for one that is missing, or no regular file.
    """
    return [_entry(name, file) for name, file in files.items()]


def _entry(name: str, file: Path) -> SourceFile:
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"corpus: '{file}' cannot be read ({error.strerror}); repair it or leave it out.") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"corpus: '{file}' is no regular file; leave it out.")
    return SourceFile(name=name, size=status.st_size, mtime_ns=status.st_mtime_ns)


def with_sha256(file: SourceFile, known: Mapping[str, str]) -> SourceFile:
    """The file with its sha256, if that is known, by its name."""
    name = file["name"]
    return {**file, "sha256": known[name]} if name in known else file


def read_record(directory: Path) -> SourceRecord | None:
    """What sources.json says; None where there is none, as beside data of earlier versions, or a damaged one."""
    try:
        return read_json(directory / SOURCES_FILE, SourceRecord, max_bytes=MAX_BYTES)
    except DamagedError:
        return None


def write_record(directory: Path, record: SourceRecord) -> None:
    """Writes sources.json."""
    write_file(directory / SOURCES_FILE, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def identity_of(record: SourceRecord) -> str:
    """A sha256 over recipe, commit, names, sizes and times: another for every other plan of a preparation."""
    files = [(file["name"], file["size"], file["mtime_ns"]) for file in record["files"]]
    parts = [record["made_of"], files, record.get("revision")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def changes(
    then: Sequence[SourceFile], now: Sequence[SourceFile], files: Mapping[str, Path], *, is_partly_read: bool = False
) -> list[str]:
    """How files differ, one clause each; those of the same size and another time are read through for that.

    Args:
        then: as they were, with the sha256 of those that were read.
        now: as they are.
        files: where they are.
        is_partly_read: whether a file without a sha256 has not been read yet, so that its time is no difference.
    """
    before, after = {file["name"]: file for file in then}, {file["name"]: file for file in now}
    differing = [name for name in before if name in after and _time(before[name]) != _time(after[name])]
    resized = {name for name in differing if before[name]["size"] != after[name]["size"]}
    unread = {name for name in differing if "sha256" not in before[name]} - resized
    touched = [name for name in differing if name not in resized | unread]
    changed = resized | (set() if is_partly_read else unread) | set(_rewritten(touched, before, after, files))
    return [
        *(f"{name} has changed" for name in before if name in changed),
        *(f"{name} is gone" for name in before if name not in after),
        *(f"{name} is new" for name in after if name not in before),
    ]


def _time(file: SourceFile) -> tuple[int, int]:
    return file["size"], file["mtime_ns"]


def _rewritten(
    touched: Sequence[str],
    before: Mapping[str, SourceFile],
    after: Mapping[str, SourceFile],
    files: Mapping[str, Path],
) -> list[str]:
    """Those with another sha256. The answer is remembered: who goes on training every day does not read every day."""
    if not touched:
        return []

    def read() -> list[str]:
        size = sum(after[name]["size"] for name in touched)
        print(
            f"reading {len(touched)} files of the corpus, whose times have changed, to see whether their content has "
            f"({size / 1e9:.1f} GB)",
            file=sys.stderr,
        )
        return [name for name in touched if sha256_of(files[name]) != before[name]["sha256"]]

    pairs = [[str(files[name].resolve()), dict(before[name]), dict(after[name])] for name in touched]
    digest = hashlib.sha256(json.dumps(pairs, sort_keys=True).encode()).hexdigest()
    return remembered("sources", {"files": digest}, read, shape=list[str])


def sha256_of(file: Path) -> str:
    """The sha256 of a file, in hexadecimal.

    Raises:
        UserError: where it cannot be read.
    """
    try:
        with opened(file) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except DamagedError as error:
        raise UserError(f"corpus: {error}; repair it or leave it out.") from None


def date_of(file: Path) -> str:
    """The day on which a file was written."""
    return time.strftime("%Y-%m-%d", time.localtime(file.stat().st_mtime))


class ReadingWatch:
    """Notes what was read of a corpus, and refuses what changes meanwhile.

    Attributes:
        sha256: of the files that this task is to take it of, by their names.
    """

    def __init__(self, files: Mapping[str, Path], found: Sequence[SourceFile], *, task: int, num_tasks: int) -> None:
        """Watches nothing yet.

        Args:
            files: all of the corpus, in order.
            found: as they are when the task begins.
            task: its number. Of file i the task i % num_tasks takes the sha256.
            num_tasks: how many there are.
        """
        self._found = {files[file["name"]]: file for file in found}
        self._own = set(list(files.values())[task::num_tasks])
        self.sha256: dict[str, str] = {}

    def read(self, file: Path) -> None:
        """Takes note that a file has just been read, and so may still be in the page cache.

        Raises:
            UserError: where it is not what it was when the task began.
        """
        before = self._found[file]
        if file in self._own:
            self.sha256[before["name"]] = sha256_of(file)
        if _time(_entry(before["name"], file)) != _time(before):
            raise UserError(
                f"corpus: '{file}' has changed while it was read; start the same command again when nothing writes to "
                f"it any more."
            )
