"""What is told before step 1: the plan of the run, the room that it takes, what it will learn of conversations."""

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpt2x.batches.source import ShardSource
from gpt2x.config import accumulation_steps
from gpt2x.distributed.devices import describe_device
from gpt2x.distributed.ranks import data_rank
from gpt2x.distributed.sharding import is_sharded
from gpt2x.errors import UserError
from gpt2x.models import flops_per_token, num_parameters
from gpt2x.runs.changes import as_table
from gpt2x.shards.statistics import preview
from gpt2x.training.trainer import Trainer

_BYTES_PER_NUMBER = 4  # weights and optimizer state are float32
# What the estimate leaves out: headers, the tokenizer, records, plots.
_ALLOWANCE = 10_000_000

# --- room ------------------------------------------------------------------------------------------------------------


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


# --- the plan --------------------------------------------------------------------------------------------------------


def describe(trainer: Trainer) -> str:
    """The plan of a run: model, batch, budget, cost, hardware, room, and what is no longer as it was; one fact a line.

    Raises:
        UserError: where the disk is too small.
    """
    recipe, config, progress = trainer.recipe, trainer.plain_model.config, trainer.progress
    room = measure_room(trainer)
    warning = check_room(room, trainer.run.path)
    total, multiplied = num_parameters(trainer.plain_model)
    lines = {
        "run": f"{trainer.run.path}" + (f", resumed at step {progress.step:,}" if progress.step else ""),
        "model": f"{total:,} parameters ({multiplied:,} in matrix products): {config.num_hidden_layers} layers x "
        f"{config.hidden_size}, {config.vocab_size:,} token ids",
        "data": _data(trainer),
        "step": _batch(trainer),
        "budget": _budget(trainer),
        "compute": f"{flops_per_token(trainer.plain_model, recipe.data.sequence_length):.3g} FLOPs per token",
        "optimizer": f"{recipe.optimizer.name}, {recipe.optimizer.lr_scheduler_type} schedule",
        "devices": f"{describe_device(trainer.accelerator)}, mixed precision {recipe.train.mixed_precision}"
        + (", compiled" if recipe.train.torch_compile else ""),
        "saving": _saving(trainer, room),
    }
    facts = [*lines.items(), *([("changed", _below(as_table(trainer.run.changes)))] if trainer.run.changes else [])]
    facts += [("warning", warning)] if warning else []
    return "\n".join(f"{name + ':':11s}{text}" for name, text in facts)


def previews(trainer: Trainer) -> Iterator[str]:
    """An example of every source of conversations, with what is learned of it."""
    for source in trainer.batches.batches.sources.values():
        if isinstance(source, ShardSource) and any(shard.targets is not None for shard in source.windows.shards):
            yield preview(source.windows.shards, trainer.tokenizer)


def _saving(trainer: Trainer, room: Room) -> str:
    disk = (
        f"{room.num_kept} checkpoints of {_megabytes(room.checkpoint_bytes)} and the final model, "
        f"{_megabytes(room.needed_bytes)} of {_megabytes(room.free_bytes)} free"
    )
    if is_sharded(trainer.plain_model):  # the shards are put together anew each time, at the end too
        return f"{disk}; each save takes {_megabytes(room.checkpoint_bytes)} of the main process's host memory"
    if trainer.recipe.train.save_steps is None:
        return disk
    return f"{disk}; copies for saving take {_megabytes(room.checkpoint_bytes)} of host memory, from the first step on"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes < 1e10 else f"{num_bytes / 1e9:,.0f} GB"


def _below(lines: Sequence[str]) -> str:
    """The lines of one fact, each below the other."""
    return ("\n" + " " * 11).join(lines)


def _data(trainer: Trainer) -> str:
    lines = []
    for section, source in zip(trainer.recipe.data.mixture, trainer.batches.batches.sources.values(), strict=True):
        size = "a stream" if source.num_tokens is None else f"{source.num_tokens:,} training tokens"
        lines.append(f"{section.location}: {size}")
    phase = trainer.batches.batches.order.phases[-1]
    if len(lines) > 1:
        counts = zip(lines, phase.weights, phase.counts_per_block, strict=True)
        lines = [f"{line}, {count / phase.block_size:.1%} of the batch as {name}" for line, name, count in counts]
    validation = f"{trainer.validation_batches.num_targets:,} validation tokens"
    return _below([*lines, validation]) if len(lines) > 1 else f"{lines[0]}, {validation}"


def _batch(trainer: Trainer) -> str:
    train, length = trainer.recipe.train, trainer.recipe.data.sequence_length
    processes = data_rank(trainer.accelerator).num_ranks
    accumulation = accumulation_steps(
        train.tokens_per_step,
        micro_batch_size=train.micro_batch_size,
        sequence_length=length,
        num_processes=processes,
    )
    return (
        f"{train.tokens_per_step:,} tokens = {train.micro_batch_size} sequences x {length} tokens x "
        f"{processes} processes x {accumulation} accumulation steps"
    )


def _budget(trainer: Trainer) -> str:
    budget = trainer.budget
    if budget.max_steps is None:
        return f"{budget.max_time_s:g} s of training"
    tokens = budget.max_steps * trainer.recipe.train.tokens_per_step
    flops = tokens * flops_per_token(trainer.plain_model, trainer.recipe.data.sequence_length)
    return f"{budget.max_steps:,} steps = {tokens:,} tokens{_epochs(trainer, budget.max_steps)} = {flops:.3g} FLOPs"


def _epochs(trainer: Trainer, num_steps: int) -> str:
    """Of one source of known size; those of a mixture end at different times."""
    sizes = [source.num_windows for source in trainer.batches.batches.sources.values()]
    num_sequences = num_steps * trainer.batches.batches.order.phases[-1].sequences_per_step
    return f" = {num_sequences / sizes[0]:.2f} epochs" if len(sizes) == 1 and sizes[0] else ""
