"""Whether the files of a model are whole, as far as that can be known without loading them.

A checkpoint and a final model have a manifest with the size and sha256 of every file, written last. Any other
directory of a model has the sizes in the headers of its safetensors files, and the names of its shards in their index.
"""

import fnmatch
import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from gpt2x.files import DamagedError, opened, read_json
from gpt2x.runs.layout import MODEL

MANIFEST = "manifest.json"
WEIGHTS_INDEX = "model.safetensors.index.json"


class FileFacts(TypedDict):
    """What is known of a file."""

    size: int
    sha256: str


class Manifest(TypedDict):
    """The files by their paths in the directory."""

    files: dict[str, FileFacts]


class _WeightsIndex(TypedDict):
    weight_map: dict[str, str]


# --- manifests -------------------------------------------------------------------------------------------------------


def write_manifest(directory: Path) -> None:
    """Describes all that lies in a directory; the last file to be written."""
    files = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (directory / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def damage_of(directory: Path, *, only: str = "*", by_size: bool = False) -> str | None:
    """What is wrong with a directory that has a manifest; None where nothing is.

    Args:
        directory: whose files are looked at.
        only: a pattern of their names.
        by_size: whether to ask for their sizes alone, and not to read every byte.
    """
    try:
        files = _files(directory)
        names = fnmatch.filter(files, only)
        for name in names:
            with opened(directory / name) as stream:
                size = stream.seek(0, 2)
            if size != files[name]["size"]:
                return f"{name} has {size} bytes instead of {files[name]['size']}"
        for name in [] if by_size else names:
            if sha256_of(directory / name) != files[name]["sha256"]:
                return f"{name} differs from its manifest"
    except DamagedError as error:
        return str(error).replace(f"{directory}/", "")
    return None if files else f"{MANIFEST} names no file"


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
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(directory: Path) -> dict[str, FileFacts]:
    files = read_json(directory / MANIFEST, Manifest)["files"]
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise DamagedError(f"{MANIFEST} names a file outside, {name!r}")
    return files


# --- any model -------------------------------------------------------------------------------------------------------


def damage_of_model(directory: Path) -> str | None:
    """What is wrong with the files of a model's directory; None where nothing is known to be.

    The model of a checkpoint must be what its manifest says, to the last bit; what lies beside it for a resumed run
    does not matter here. Of another directory with a manifest the weights must be: its settings may have been edited.
    """
    if directory.name == MODEL and (directory.parent / MANIFEST).exists():
        return damage_of(directory.parent, only=f"{MODEL}/*")
    try:
        for name in ("config.json", "adapter_config.json"):
            if (directory / name).exists():
                read_json(directory / name, dict[str, Any])
        shards = indexed_weights(directory)
    except DamagedError as error:
        return str(error).replace(f"{directory}/", "")
    if missing := [name for name in shards if not (directory / name).is_file()]:
        return f"{missing[0]} is missing"
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "np"):  # compares the size of the file with what its header says
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name} is cut or damaged ({error})"
    return damage_of(directory, only="*.safetensors") if (directory / MANIFEST).exists() else None


def indexed_weights(directory: Path) -> list[str]:
    """The files over which the weights of a model are spread, as their index names them; none where there is none.

    Raises:
        DamagedError: where the index is no such index.
    """
    index = directory / WEIGHTS_INDEX
    return sorted(set(read_json(index, _WeightsIndex)["weight_map"].values())) if index.exists() else []
