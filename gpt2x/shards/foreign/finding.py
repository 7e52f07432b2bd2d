"""Which files a path means, and which of them are held out."""

import glob
import re
from pathlib import Path
from typing import Any

from gpt2x.errors import UserError
from gpt2x.files import DamagedError, read_json
from gpt2x.locate import does_not_exist
from gpt2x.shards.foreign.formats import SUFFIXES, format_of

HELD_OUT = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])", re.IGNORECASE)
"""A word of a file's name: val.bin, fineweb_val_000000.bin, validation-00000-of-00001.parquet."""


def find_files(path: str, *, validation_path: str | None = None) -> dict[str, list[Path]]:
    """The token files of train and of validation, in natural order: part_2 before part_10.

    One file is train, whatever its name. A directory or a pattern gives those with the word val, valid or validation
    in their name to validation; a directory of a saved DatasetDict its split of such a name, and to train the split
    train. A file of validation_path is never train.

    Raises:
        UserError: for a path that means no token file, and for files of several formats.
    """
    splits = _split(path)
    if validation_path is not None:
        held_out = _split(validation_path)
        splits["validation"] = held_out["train"] + held_out["validation"]
        names = {file.resolve() for file in splits["validation"]}
        splits["train"] = [file for file in splits["train"] if file.resolve() not in names]
    return splits


def natural_order(file: Path) -> list[str | int]:
    """A sort key that takes digits as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(file))]


def _split(path: str) -> dict[str, list[Path]]:
    place = Path(path)
    if place.is_file():
        return {"train": [place], "validation": []}
    if (place / "dataset_dict.json").is_file():
        return _saved_splits(place)
    files = _saved_files(place) if (place / "state.json").is_file() else _token_files(path)
    if not files:
        if not place.exists() and not glob.has_magic(path):
            raise does_not_exist(path, "token files of another project, or a directory of them")
        raise UserError(
            f"'{path}' holds no token shards (index.json) and no token files of another project "
            f"({', '.join(SUFFIXES)}); make shards by scripts/prepare_data.py, or correct the path."
        )
    _check_one_format(files)
    is_held_out = {file: bool(HELD_OUT.search(file.name)) for file in files}
    return {
        "train": [file for file in files if not is_held_out[file]],
        "validation": [file for file in files if is_held_out[file]],
    }


def _token_files(path: str) -> list[Path]:
    found = Path(path).iterdir() if Path(path).is_dir() else (Path(name) for name in glob.glob(path, recursive=True))
    return sorted((file for file in found if file.suffix in SUFFIXES and file.is_file()), key=natural_order)


def _saved_splits(directory: Path) -> dict[str, list[Path]]:
    """The files of a saved DatasetDict; its splits of other names, test for one, are not read."""
    file = directory / "dataset_dict.json"
    names = [_plain(file, name) for name in _listed(file, "splits")]
    chosen = {"train": [name for name in names if name == "train"]}
    chosen["validation"] = [name for name in names if HELD_OUT.search(name)]
    return {split: [file for name in chosen[split] for file in _saved_files(directory / name)] for split in chosen}


def _saved_files(directory: Path) -> list[Path]:
    """The files of a saved Dataset as it lists them; others beside them are caches of datasets."""
    listed = _listed(directory / "state.json", "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    files = [directory / _plain(directory / "state.json", name) for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, but state.json lists it; copy the directory again.")
    return files


def _listed(file: Path, key: str) -> list:
    try:
        listed = read_json(file, dict[str, Any]).get(key)
    except DamagedError:
        listed = None
    if not isinstance(listed, list):
        raise UserError(f"{file} is missing or lists no {key}; save the dataset again by save_to_disk.")
    return listed


def _plain(listing: Path, name: object) -> str:
    """A listed name. The list may come from a stranger: it must not reach outside its directory."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise UserError(f"{listing}: {name!r} must be a plain name; save the dataset again by save_to_disk.")
    return name


def _check_one_format(files: list[Path]) -> None:
    formats = [(file, format_of(file).name) for file in files]
    for file, name in formats[1:]:
        if name != formats[0][1]:
            raise UserError(
                f"{formats[0][0]} is {formats[0][1]} and {file} is {name}; name the files of one of them by a pattern."
            )
