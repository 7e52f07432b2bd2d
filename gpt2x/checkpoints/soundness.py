"""Whether tensors are worth a checkpoint: one that is not must never take the place of one that is."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from gpt2x.checkpoints.format import list_checkpoints
from gpt2x.runs.layout import step_of


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where none does."""
    return next((name for name, tensor in tensors if tensor.is_floating_point() and not _is_finite(tensor)), None)


def _is_finite(tensor: Tensor) -> bool:
    # A sum reads every number once and copies none; it may overflow where none of them is infinite.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def not_saved(run_dir: Path, step: int, reason: str) -> str:
    """One line: why the state after a step is no checkpoint, and from where to go on, with what."""
    older = [checkpoint for checkpoint in list_checkpoints(run_dir) if step_of(checkpoint) < step]
    way_on = f"goes on from {older[-1]}" if older else "starts anew"
    return (
        f"{reason}; the state after step {step} is not saved, and no checkpoint was deleted: with a lower learning "
        f"rate (optimizer.learning_rate) and --resume the same command {way_on}."
    )
