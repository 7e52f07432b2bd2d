"""How much room a run needs, on the disk and in memory, before its first step."""

import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpt2x.errors import UserError
from gpt2x.training.trainer import Trainer

_BYTES_PER_NUMBER = 4  # weights and optimizer state are float32
# What the estimate leaves out: headers, the tokenizer, records, plots.
_ALLOWANCE = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Room:
    """The room that the checkpoints of a run take.

    Attributes:
        checkpoint_bytes: of one checkpoint.
        model_bytes: of the final model.
        num_kept: how many checkpoints there are at a time, the one being written included.
        num_for_ever: how many more gather in the course of the run; None where nobody can know.
        free_bytes: what there is, older checkpoints of the run included.
    """

    checkpoint_bytes: int
    model_bytes: int
    num_kept: int
    num_for_ever: int | None
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        """What the run cannot do without."""
        return self.num_kept * self.checkpoint_bytes + self.model_bytes + _ALLOWANCE


def measure_room(trainer: Trainer) -> Room:
    """What a run needs and what there is."""
    num_kept, num_for_ever = _counts(trainer)
    saved, final = trainer.trainee.num_saved(trainer.plain_model)
    return Room(
        checkpoint_bytes=_BYTES_PER_NUMBER * saved + _optimizer_bytes(trainer),
        model_bytes=_BYTES_PER_NUMBER * final,
        num_kept=num_kept,
        num_for_ever=num_for_ever,
        free_bytes=shutil.disk_usage(_existing(trainer.run.path)).free + _used_bytes(trainer.run.checkpoints_dir),
    )


def check_room(room: Room, run_dir: Path) -> str | None:
    """Refuses a run that the disk cannot hold.

    Returns:
        A warning where it may become full before the end; None where it will not.

    Raises:
        UserError: with the bytes that are needed and free.
    """
    if room.needed_bytes > room.free_bytes:
        raise UserError(
            f"{run_dir}: {room.num_kept} checkpoints of {room.checkpoint_bytes:,} bytes and the final model need "
            f"{room.needed_bytes:,} bytes, {room.free_bytes:,} are free; make room, lower train.save_total_limit, or "
            f"set run.dir."
        )
    if room.num_for_ever is None:
        return "every checkpoint is kept (train.save_total_limit null): watch the disk."
    in_all = room.needed_bytes + room.num_for_ever * room.checkpoint_bytes
    if in_all > room.free_bytes:
        return (
            f"{run_dir}: all {room.num_kept + room.num_for_ever} checkpoints will need {in_all:,} bytes, "
            f"{room.free_bytes:,} are free: make room in time, or keep fewer."
        )
    return None


def _counts(trainer: Trainer) -> tuple[int, int | None]:
    """(checkpoints there at a time, those that gather beside them or None)."""
    train, max_steps = trainer.recipe.train, trainer.budget.max_steps
    num_special = int(train.save_best) + int(trainer.recipe.optimizer.lr_scheduler_type == "wsd")
    if train.save_steps is None:
        return 2 + num_special, 0
    num_made = None if max_steps is None else max_steps // train.save_steps + 1
    if train.save_total_limit is None:
        return 2 + num_special, None if num_made is None else num_made
    num_for_ever = 0
    if train.keep_steps is not None:
        num_for_ever = 0 if max_steps is None else max_steps // train.keep_steps
    limit = train.save_total_limit if num_made is None else min(train.save_total_limit, num_made)
    return limit + 1 + num_special, num_for_ever


def _optimizer_bytes(trainer: Trainer) -> int:
    """AdamW keeps two numbers per parameter, Muon one."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    numbers = ((2 if "betas" in group else 1) * parameter.numel() for group in groups for parameter in group["params"])
    return _BYTES_PER_NUMBER * sum(numbers)


def _used_bytes(directory: Path) -> int:
    """Of the files below a directory, as far as they can be looked at."""
    used = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                status = os.lstat(os.path.join(parent, name))
                used += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return used


def _existing(path: Path) -> Path:
    """The nearest directory that is there."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
