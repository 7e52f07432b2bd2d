"""What can be known before step 1, told before step 1."""

from collections.abc import Iterator, Sequence

from gpt2x.batches.source import tokens_of
from gpt2x.config import accumulation_steps
from gpt2x.distributed.devices import describe_device
from gpt2x.distributed.ranks import data_rank
from gpt2x.distributed.sharding import is_sharded
from gpt2x.models import flops_per_token, num_parameters
from gpt2x.runs.changes import as_table
from gpt2x.shards.statistics import preview
from gpt2x.training.disk import Room, check_room, measure_room
from gpt2x.training.trainer import Trainer


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
    for section in trainer.recipe.data.mixture:
        if section.stream is None:
            tokens = tokens_of(section)
            if any(shard.targets is not None for shard in tokens.open_split("train")):
                yield preview(tokens, trainer.tokenizer)


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
