"""Whether the files of a model are whole, as far as that can be known without loading them.

A checkpoint has a manifest with the size and sha256 of every file, written last. Any directory of a model has the
sizes in the headers of its safetensors files, and the names of its shards in their index.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from gpt2x.files import DamagedError, read_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-([0-9]{6}|[1-9][0-9]{6,17})")
_WEIGHTS_INDEX = "model.safetensors.index.json"


class FileFacts(TypedDict):
    """What a manifest says of a file."""

    size: int
    sha256: str


class _Manifest(TypedDict):
    files: dict[str, FileFacts]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def named_checkpoints(run_dir: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, oldest first."""
    named = (path for path in (run_dir / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(named, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is named after."""
    found = _NAME.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def missing_or_cut(directory: Path, *, under: str = "") -> str | None:
    """What keeps a directory from being as its manifest says, as far as sizes tell; None where nothing does.

    Args:
        directory: of a checkpoint.
        under: only the files whose names begin so are looked at.
    """
    files = _facts(directory)
    if not files:
        return f"its {MANIFEST} is missing or unreadable"
    for name, facts in files.items():
        file = directory / name
        if name.startswith(under) and not file.is_file():
            return f"{name} is missing"
        if name.startswith(under) and file.stat().st_size != facts["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {facts['size']}"
    return None


def damage_of(directory: Path, *, under: str = "") -> str | None:
    """What is wrong with a directory, every byte of it read; None where nothing is. See missing_or_cut."""
    if (found := missing_or_cut(directory, under=under)) is not None:
        return found
    names = [name for name in _facts(directory) if name.startswith(under)]
    return next(filter(None, (_damage_of_file(directory, name) for name in names)), None)


def _facts(directory: Path) -> dict[str, FileFacts]:
    """What the manifest says of each file; nothing where it is missing or damaged."""
    try:
        return read_json(directory / MANIFEST, _Manifest)["files"]
    except DamagedError:
        return {}


def _damage_of_file(directory: Path, name: str) -> str | None:
    try:
        with (directory / name).open("rb") as content:
            is_whole = hashlib.file_digest(content, "sha256").hexdigest() == _facts(directory)[name]["sha256"]
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if is_whole else f"{name} differs from its manifest"


# --- any model -------------------------------------------------------------------------------------------------------


def damage_of_model(directory: Path) -> str | None:
    """What is wrong with the files of a model's directory; None where nothing is known to be.

    The model of a checkpoint must be what its manifest says, to the last bit; what lies beside it for a resumed run
    does not matter here. Of another directory with a manifest the weights must be: its settings may have been edited.
    """
    if directory.name == "model" and (directory.parent / MANIFEST).exists():
        return damage_of(directory.parent, under="model/")
    for name in ("config.json", "adapter_config.json"):
        if (directory / name).exists() and (found := _damage_of_json(directory / name)):
            return found
    return _damage_of_weights(directory)


def _damage_of_json(file: Path) -> str | None:
    try:
        read_json(file, dict[str, Any])
    except DamagedError as error:
        return str(error).replace(f"{file.parent}/", "")
    return None


def _damage_of_weights(directory: Path) -> str | None:
    index = directory / _WEIGHTS_INDEX
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{_WEIGHTS_INDEX} is unreadable"
        if missing := [name for name in shards if not (directory / name).is_file()]:
            return f"{missing[0]} is missing"
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "np"):  # compares the size of the file with what its header says
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name} is cut or damaged ({error})"
    named = [name for name in _facts(directory) if name.endswith(".safetensors")]
    if missing := [name for name in named if not (directory / name).is_file()]:
        return f"{missing[0]} is missing"
    return next(filter(None, (_damage_of_file(directory, name) for name in named)), None)
