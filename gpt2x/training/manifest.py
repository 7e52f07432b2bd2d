"""What a directory of ours must hold: a manifest of its files, by which it is known whether it still does."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any, cast

from typing_extensions import TypedDict

from gpt2x.files import DamagedError, opened, read_json

MANIFEST = "manifest.json"


class FileFacts(TypedDict):
    """What is known of a file."""

    size: int
    sha256: str


class Manifest(TypedDict):
    """The files by their paths in the directory."""

    files: dict[str, FileFacts]


def write_manifest(directory: Path) -> None:
    """Describes all that lies in a directory; the last file to be written."""
    files = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (directory / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def missing_or_cut(directory: Path) -> str | None:
    """What keeps a directory from being whole, as far as sizes tell; None where nothing does."""
    try:
        files = _files(directory)
        for name, facts in files.items():
            with opened(directory / name) as stream:
                size = stream.seek(0, 2)
            if size != facts["size"]:
                return f"{name} has {size} bytes instead of {facts['size']}"
    except DamagedError as error:
        return str(error).replace(f"{directory}/", "")
    return None if files else f"{MANIFEST} names no file"


def damage_of(directory: Path) -> str | None:
    """What is wrong with a directory, every byte of it read; None where nothing is."""
    found = missing_or_cut(directory)
    if found is not None:
        return found
    try:
        for name, facts in _files(directory).items():
            if sha256_of(directory / name) != facts["sha256"]:
                return f"{name} differs from its manifest"
    except DamagedError as error:
        return str(error).replace(f"{directory}/", "")
    return None


def strangers_in(directory: Path) -> list[str]:
    """The paths of what lies in a directory and not in its manifest."""
    known = {MANIFEST, *_files(directory)}
    paths = (path for path in sorted(directory.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [name for path in paths if (name := path.relative_to(directory).as_posix()) not in known]


def sha256_of(file: Path) -> str:
    """Of a regular file, in hexadecimal.

    Raises:
        DamagedError: where it cannot be read.
    """
    with opened(file) as stream:
        return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()


def _files(directory: Path) -> dict[str, FileFacts]:
    files = read_json(directory / MANIFEST, Manifest)["files"]
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise DamagedError(f"{MANIFEST} names a file outside, {name!r}")
    return files
