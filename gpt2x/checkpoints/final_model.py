"""The trained model of a run, final/: whole or not there, and known to be."""

import os
from collections.abc import Callable
from pathlib import Path

from gpt2x.files import DamagedError, set_aside, tell_once, whole_directory
from gpt2x.manifest import MANIFEST, damage_of, strangers_in, write_manifest


def damage_of_final(final: Path) -> str | None:
    """What is wrong with a final model, every byte of it read; None where nothing is."""
    if not final.is_dir():
        return "it is missing"
    return damage_of(final) if (final / MANIFEST).exists() else _damage_without_manifest(final)


def write_final(final: Path, write: Callable[[Path], str]) -> str:
    """Writes final/ with its manifest. One that is there gives way once this is whole on the disk; where it is not as
    it was written, or holds what others have put there, it is kept under another name.

    Args:
        final: where to.
        write: writes model and tokenizer into the directory it is given, and returns the model_type.

    Raises:
        UnwritableError: where it cannot be written.
    """
    with whole_directory(final, replaces=True) as partial:
        model_type = write(partial)
        write_manifest(partial)
        if os.path.lexists(final) and not _is_as_written(final):
            kept = set_aside(final)
            tell_once(f"{final} was not as the run left it; it is kept as {kept}.")
    return model_type


def _is_as_written(final: Path) -> bool:
    try:
        return not final.is_symlink() and damage_of(final) is None and not strangers_in(final)
    except DamagedError:
        return False


def _damage_without_manifest(final: Path) -> str | None:
    """As far as can be told of what an older version has written."""
    from safetensors import SafetensorError, safe_open

    weights = sorted(final.glob("*.safetensors"))
    if not weights or not any((final / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "it holds no model"
    for file in weights:
        try:
            with safe_open(file, "numpy"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name} cannot be read ({error})"
    return None
