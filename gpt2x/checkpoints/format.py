"""Checkpoints: at once an exactly resumable state and a stock Hugging Face model.

    checkpoints/step-000100/
        model/          the weights as a transformers model, float32, with the tokenizer
        state/          optimizer.safetensors and trainer.json
        manifest.json   size and sha256 of every file above, written last

A checkpoint is made in a temporary sibling, flushed to the disk and renamed; only then are older ones deleted. A
directory without a manifest that fits is never resumed from. Nothing here is ever unpickled.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required

from typing_extensions import TypedDict

from gpt2x.files import (
    DamagedError,
    parse_json,
    read_bytes,
    remove_leftovers,
    retire,
    set_aside,
    tell_once,
    unwritable,
    whole_directory,
)
from gpt2x.manifest import MANIFEST, damage_of, damage_of_model, strangers_in, write_manifest
from gpt2x.runs.layout import MODEL, OPTIMIZER, TRAINER, RunLayout, named_checkpoints

if TYPE_CHECKING:
    from torch import Tensor


class TrainerState(TypedDict, total=False):
    """trainer.json: what a resumed run needs beside tensors. What older versions did not write is absent."""

    step: Required[int]
    tokens: int
    elapsed_s: float
    step_s: float
    is_followed_up: bool
    skipped_steps: int
    skipped_in_a_row: int
    scaler_skipped_steps: int
    decays_to: float | None
    best_val_loss: float | None
    best_step: int | None
    optimizer: str
    scaler: dict[str, Any] | None
    data: dict[str, Any]
    environment: dict[str, Any]
    recipe: dict[str, Any]


# --- writing ---------------------------------------------------------------------------------------------------------


def write_checkpoint(
    target: Path,
    *,
    write_model: Callable[[Path], object],
    optimizer: dict[str, "Tensor"],
    trainer: Mapping[str, Any],
) -> None:
    """Writes a whole checkpoint, or nothing that could be mistaken for one.

    Args:
        target: the directory of the checkpoint, of a run that is there; a damaged one of that name is replaced.
        write_model: writes model and tokenizer into the directory it is given.
        optimizer: tensors of the optimizer's state.
        trainer: what else a resumed run needs, as JSON.

    Raises:
        UnwritableError: where it cannot be written; nothing of it is left.
    """
    from safetensors.torch import save_file

    with unwritable(target):
        target.parent.mkdir(exist_ok=True)
    if target.is_symlink():  # somebody's, to a disk that is not there
        set_aside(target)
    with whole_directory(target, replaces=True) as temporary:
        (temporary / TRAINER).parent.mkdir()
        write_model(temporary / MODEL)
        save_file(optimizer, temporary / OPTIMIZER)
        content = json.dumps(trainer, indent=2, allow_nan=False) + "\n"
        (temporary / TRAINER).write_text(content, encoding="utf-8")
        write_manifest(temporary)


def remove_checkpoints(run_dir: Path, checkpoints: Iterable[Path]) -> None:
    """Deletes checkpoints, each whole or not at all, and what killed saves and deletions left behind. Links, which
    only a user makes, stay; what cannot be deleted is told once."""
    for checkpoint in checkpoints:
        if not checkpoint.is_symlink():
            retire(checkpoint)
    remove_leftovers(RunLayout(run_dir).checkpoints_dir, "step-*")


# --- reading ---------------------------------------------------------------------------------------------------------


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first: those whose manifest names files of the right sizes.

    Raises:
        UserError: where the directory of checkpoints cannot be read.
    """
    return [path for path in named_checkpoints(run_dir) if damage_of(path, by_size=True) is None]


def newest_checkpoint(
    run_dir: Path, *, is_wanted: Callable[[TrainerState], bool] = lambda _trainer: True
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as it was written.

    Args:
        run_dir: the run's.
        is_wanted: asked of what each whole checkpoint holds beside tensors; those that are not are passed over
            silently.

    Returns:
        Its directory (None where there is none), and a line for each newer one that was passed over.

    Raises:
        UserError: where the directory of checkpoints cannot be read.
    """
    passed_over: list[str] = []
    for checkpoint in reversed(named_checkpoints(run_dir)):
        damage = damage_of(checkpoint)
        try:
            if damage is None and is_wanted(read_trainer(checkpoint)):
                return checkpoint, passed_over
        except DamagedError as error:
            damage = str(error).replace(f"{checkpoint}/", "")
        if damage is not None:
            passed_over.append(f"{checkpoint} is damaged ({damage}); looking for an older one.")
    return None, passed_over


def read_trainer(checkpoint: Path) -> TrainerState:
    """What a checkpoint holds beside tensors.

    Raises:
        DamagedError: where it is not as it was written.
    """
    file = checkpoint / TRAINER
    # An older version wrote a best validation loss that was none.
    return parse_json(read_bytes(file).replace(b": NaN", b": null"), TrainerState, where=str(file))


def read_state(checkpoint: Path) -> tuple[dict[str, "Tensor"], TrainerState]:
    """The optimizer's tensors and the trainer's JSON of a whole checkpoint."""
    from safetensors.torch import load_file

    return load_file(checkpoint / OPTIMIZER), read_trainer(checkpoint)


# --- the final model -------------------------------------------------------------------------------------------------


def damage_of_final(final: Path) -> str | None:
    """What is wrong with a final model, every byte of it read; None where nothing is."""
    if not final.is_dir():
        return "it is missing"
    if (final / MANIFEST).exists():
        return damage_of(final)
    # an older version wrote none
    has_config = any((final / name).is_file() for name in ("config.json", "adapter_config.json"))
    is_model = has_config and any(final.glob("*.safetensors"))
    return damage_of_model(final) if is_model else "it holds no model"


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
