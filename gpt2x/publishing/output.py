"""What stands against an export, told before torch is imported, and where it appears: whole, or not at all."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2x.config.publishing import ExportRecipe
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, locked, make_directory, read_json, remove_leftovers, unwritable, whole_directory
from gpt2x.manifest import MANIFEST
from gpt2x.prerequisites import check_installed, check_model, model_type_of
from gpt2x.runs.layout import MODEL, RunLayout

GGUF_TYPES = ("gpt2", "llama", "qwen3")
"""The forms that llama.cpp computes."""
# In which the configs of two precisions of one model may differ.
_INCIDENTAL = {"dtype", "torch_dtype", "transformers_version", "transformers.js_config", "_name_or_path"}


@contextmanager
def whole_or_nothing(output_dir: Path) -> Iterator[Path]:
    """Yields an empty directory beside `output_dir`; when the block has succeeded, its files are there, durably.

    A new directory appears by one rename. Into one that exists (another precision of the same model) the files are
    moved one by one, `config.json` last. Of two exports to one place the second waits. What a killed one leaves has a
    temporary name, and the next one to this place removes it.

    Raises:
        UserError: where `output_dir` is something else than an export of this model, or cannot be written.
    """
    place = Path(os.path.realpath(output_dir))
    check_output(output_dir)
    make_directory(place.parent)
    with locked(place.with_name(f".{place.name}.export.lock"), waits=True):
        remove_leftovers(place.parent, glob.escape(place.name))
        with whole_directory(place, joins=True) as partial:
            yield partial
            check_output(output_dir)
            _check_same_model(output_dir, partial)


def check_output(output_dir: Path, *, source: str | None = None) -> None:
    """Raises a UserError where an export cannot go to a place, since it is the model itself, a file, or something that
    is no export."""
    with unwritable(output_dir):
        if not output_dir.exists():
            return
        if not output_dir.is_dir():
            raise UserError(f"output ({output_dir}) must be a directory, but is a file; give another by --output.")
        if source is not None and os.path.realpath(source) == os.path.realpath(output_dir):
            raise UserError(f"output ({output_dir}) is the model that is exported; give another by --output.")
        held = sorted(path.name for path in output_dir.iterdir())
    if held and not _is_export(output_dir):
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise UserError(
            f"output ({output_dir}) is no export: it holds {', '.join(held[:3])}{more}; give another by --output."
        )


def _is_export(directory: Path) -> bool:
    """Whether a directory looks like an export, and not like the model of a run, which has gpt2x's form too."""
    place = Path(os.path.realpath(directory))
    run = RunLayout(place.parent)
    if place == run.final_dir and os.path.lexists(run.config_file):
        return False
    if place.name == MODEL and os.path.lexists(place.parent / MANIFEST):
        return False
    is_native = (place / "config.json").is_file() and (place / "modeling_gpt2x.py").is_file()
    return is_native or any(place.glob("onnx/*.onnx")) or any(place.glob("*.gguf"))


def _check_same_model(output_dir: Path, partial: Path) -> None:
    files = (output_dir / "config.json", partial / "config.json")
    if not all(os.path.lexists(file) for file in files):  # GGUF files name their model themselves
        return
    try:
        there, new = (read_json(file, dict[str, Any]) for file in files)
    except DamagedError as error:
        raise UserError(f"{error}; delete it, or give another directory by --output.") from error
    names = sorted((there.keys() | new.keys()) - _INCIDENTAL)
    different = [name for name in names if there.get(name) != new.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"output ({output_dir}) holds an export of another model ({name} {there.get(name)!r}, not "
            f"{new.get(name)!r}); delete it, or give another by --output."
        )


def size_bytes(directory: Path, pattern: str = "**/*") -> int:
    """Bytes of the files of a directory, or of those that match a pattern."""
    return sum(path.stat().st_size for path in directory.glob(pattern) if path.is_file())


def check_export(recipe: ExportRecipe) -> str:
    """The directory of the model that is exported, or its Hub id.

    Raises:
        UserError: where there is no whole model, where the form cannot hold one of its type, where something else
            is at the output, and where a library that the form needs is not installed.
    """
    if recipe.to != "native":
        check_installed(recipe.to, what=f"--to {recipe.to}")
    found = check_model(recipe.model)
    check_output(recipe.output_dir, source=found)
    if recipe.to == "gguf" and Path(found).is_dir():
        check_gguf_type(model_type_of(Path(found)))
    return found


def check_gguf_type(model_type: str) -> None:
    """Raises UserError for a type of models that GGUF cannot hold."""
    if model_type not in GGUF_TYPES:
        raise UserError(
            f"model_type ({model_type}) must be gpt2, llama or qwen3, the forms that llama.cpp computes; export to "
            f"onnx instead."
        )
