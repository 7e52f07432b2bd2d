"""Steps that must not move the weights: without a token to predict, or not finite."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from gpt2x.checkpoints.progress import Progress
from gpt2x.training.job import Job
from gpt2x.training.scaler import MIN_SCALE
from gpt2x.training.spikes import SpikeDetector, StepLosses, Suspect, located, record_spike, suspects

NO_TARGETS = "no token to predict"


class StepOutcome(NamedTuple):
    """What became of an optimizer step, the same on all ranks but for the losses."""

    metrics: dict[str, float]
    losses: StepLosses
    obstacle: str | None
    """Why the weights were left as they were; None where they were updated, or will be at a lower scale."""
    has_overflowed: bool = False
    """Whether the weights were left as they were because the gradient, scaled for fp16, was not finite."""


def find_obstacle(metrics: Mapping[str, float], *, num_targets: float) -> str | None:
    """Why a step must not move the weights, from numbers that are the same on all ranks.

    Args:
        metrics: the step's loss, the norm of its gradient before clipping, and, where gradients are scaled for fp16,
            by how much. Scaled gradients overflow as a matter of course, until the scale has come down.
        num_targets: predicted tokens over all ranks.
    """
    loss, grad_norm, scale = metrics["train/loss"], metrics["grad_norm"], metrics.get("train/loss_scale", MIN_SCALE)
    if num_targets == 0:
        return NO_TARGETS
    if not math.isfinite(loss):
        return f"loss is {loss}"
    return None if math.isfinite(grad_norm) or scale > MIN_SCALE else f"gradient norm is {grad_norm}"


def reason_to_stop(
    job: Job, progress: Progress, outcome: StepOutcome, detector: SpikeDetector
) -> tuple[str, str] | None:
    """Counts a step that moved nothing, and writes what is known of it to spikes.jsonl. All ranks call it.

    Returns:
        Why the run must stop before this step, and what to do where the step is to blame; None where the recipe says
        to go on.
    """
    assert outcome.obstacle is not None
    if outcome.obstacle != NO_TARGETS:
        found = suspects(job, outcome.losses)
        if job.accelerator.is_main_process:
            loss = outcome.metrics["train/loss"]
            record_spike(job, progress, found, reason=outcome.obstacle, detector=detector, loss=loss)
        train = job.recipe.train
        if train.on_non_finite == "stop" or progress.skipped_in_a_row >= train.max_skipped_steps:
            return _message(job, progress, outcome.obstacle, found)
        progress.skipped_in_a_row += 1
    progress.skipped_steps += 1
    return None


def _message(job: Job, progress: Progress, obstacle: str, found: list[Suspect]) -> tuple[str, str]:
    train, first = job.recipe.train, found[0]
    batch = job.batches.batches.order.batch_of(progress.step)
    where = next(iter(located(job, progress, first)))
    remedy = f"lower the learning rate, or pass over the batch by --data.skip {batch}, both with --resume"
    if train.on_non_finite == "skip":
        obstacle += f", after {progress.skipped_in_a_row} such steps in a row (train.max_skipped_steps)"
    else:
        remedy += "; or set train.on_non_finite skip"
    reason = (
        f"step {progress.step + 1}: {obstacle} on rank {first.rank}, samples {first.first} to {first.last} of batch "
        f"{batch}, from {where} on ({job.run.spikes_file} has them all)"
    )
    return reason, remedy
