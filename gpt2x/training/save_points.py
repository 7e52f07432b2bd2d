"""Where in a run a checkpoint is made, and of what."""

from dataclasses import asdict

from gpt2x.checkpoints.optimizer_state import optimizer_tensors
from gpt2x.checkpoints.progress import Progress
from gpt2x.checkpoints.saver import State
from gpt2x.distributed.devices import environment_of
from gpt2x.distributed.flags import wait_for_main
from gpt2x.distributed.sharding import gather, is_sharded
from gpt2x.training.job import Job


def save_before_decay(job: Job, progress: Progress) -> None:
    """Saves where a warmup-stable-decay schedule is about to decay: from there a larger budget goes on."""
    schedule = job.recipe.optimizer
    is_decaying = schedule.lr_scheduler_type == "wsd" and job.budget.decay(progress) > 1 - schedule.decay_ratio
    if is_decaying and progress.decays_to is None:
        save_checkpoint(job, progress)
        progress.decays_to = job.budget.size


def save_checkpoint(job: Job, progress: Progress, *, is_last: bool = False) -> None:
    """Has a checkpoint written of where the run stands, unless there is one, once the one before is written; all ranks
    wait for that together. finish_saving waits for this one.

    Args:
        job: what is trained.
        progress: where it stands.
        is_last: whether nothing is trained from here on.
    """
    sharded = is_sharded(job.plain_model)
    if job.accelerator.is_main_process:
        job.saver.save(whole_state(job, progress), is_last=is_last or sharded)  # what was sharded is a copy already
    elif sharded:  # every process has a part of it
        whole_state(job, progress)
    wait_for_main(job.accelerator)


def finish_saving(job: Job) -> None:
    """Waits, on all ranks, until everything is written.

    Raises:
        UserError: where it could not be; on the others, that another one has ended.
    """
    job.saver.wait()
    wait_for_main(job.accelerator)


def reserve_copies(job: Job, progress: Progress) -> None:
    """Gets the memory for copies once there is an optimizer state to copy, where there will be saves on the way."""
    is_wanted = job.accelerator.is_main_process and job.recipe.train.save_steps is not None
    if is_wanted and not job.saver.is_reserved and not is_sharded(job.plain_model):
        job.saver.reserve(whole_state(job, progress))


def whole_state(job: Job, progress: Progress) -> State:
    """Everything a checkpoint holds, as it is now."""
    scaler, is_writer = job.accelerator.scaler, job.accelerator.is_main_process
    optimizer = optimizer_tensors(job.optimizers, job.parameter_names)
    return State(
        model=job.trainee.weights(job.plain_model, is_writer=is_writer).items(),
        optimizer=gather(optimizer, is_writer=is_writer).items(),
        trainer={
            **asdict(progress),  # type: ignore[typeddict-item]
            "optimizer": job.recipe.optimizer.name,
            "scaler": None if scaler is None else scaler.state_dict(),
            "data": job.batches.state(progress.step),
            "environment": environment_of(job.accelerator),
            "recipe": job.plain_recipe,
        },
    )
