"""One optimizer step: its loss, its gradient, its clipping, its update."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gpt2x.checkpoints.progress import seed_step
from gpt2x.distributed.devices import on_device
from gpt2x.distributed.ranks import data_rank
from gpt2x.training.optimizers import MIN_SCALE, set_learning_rates, settle_scale, without_scaler
from gpt2x.training.schedules import learning_rate_factor
from gpt2x.training.trainer import Trainer

NO_TARGETS = "no token to predict"

MicroBatch = Mapping[str, Tensor]


class StepLosses(NamedTuple):
    """What one rank's micro-batches say of the loss of a step."""

    shares: Tensor
    """Each micro-batch's share of the step's loss, times the number of ranks, (A,) float32 on the device."""
    targets: Tensor
    """Predicted tokens of each micro-batch, (A,) int64 on the CPU."""
    targets_per_rank: Tensor
    """Predicted tokens of the step over all ranks, divided by the number of ranks."""

    def means(self) -> Tensor:
        """Each micro-batch's own mean loss, (A,); -inf where it predicts nothing."""
        targets = self.targets.to(self.shares.device)
        means = self.shares * self.targets_per_rank / targets
        return means.masked_fill(targets == 0, -math.inf)


class StepOutcome(NamedTuple):
    """What became of an optimizer step, the same on all ranks but for the losses."""

    metrics: dict[str, float]
    losses: StepLosses
    obstacle: str | None
    """Why the weights were left as they were; None where they were updated, or will be at a lower scale."""
    has_overflowed: bool = False
    """Whether the weights were left as they were because the gradient, scaled for fp16, was not finite."""


def optimizer_step(trainer: Trainer, micro_batches: Sequence[MicroBatch]) -> StepOutcome:
    """One update of the weights from all micro-batches of a step.

    The loss is the sum of the cross-entropies of the whole step, over micro-batches and ranks, divided by the step's
    valid tokens, so that the gradient does not depend on how the step is cut. Where loss or gradient are not finite,
    which all ranks see alike, the weights are left as they are, by all optimizers.
    """
    accelerator, model, recipe, progress = trainer.accelerator, trainer.model, trainer.recipe, trainer.progress
    seed_step(recipe.run.seed, step=progress.step, rank=data_rank(accelerator).rank)
    factor = learning_rate_factor(
        recipe.optimizer, warmup=trainer.budget.warmup(progress), progress=trainer.budget.decay(progress)
    )
    set_learning_rates(trainer.optimizers, factor)
    losses = accumulate_losses(accelerator, model, micro_batches)
    loss = accelerator.reduce(losses.shares.sum(), reduction="mean")
    grad_norm = clip_gradients(accelerator, model, recipe.train.max_grad_norm)
    metrics = {
        "train/loss": loss.item(),
        "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        "grad_norm": grad_norm,
    }
    scaler, num_targets = accelerator.scaler, losses.targets_per_rank.item()
    if scaler is not None:
        metrics["train/loss_scale"] = scaler.get_scale()
    obstacle = find_obstacle(metrics, num_targets=num_targets)
    has_overflowed = obstacle is None and not math.isfinite(grad_norm)
    trainer.saver.wait_for_copy()
    if scaler is not None:
        settle_scale(scaler, is_kept=obstacle is not None)
    for optimizer in trainer.optimizers:
        if obstacle is None and not has_overflowed:
            without_scaler(optimizer).step()
        optimizer.zero_grad(set_to_none=True)
    return StepOutcome(metrics, losses, obstacle, has_overflowed)


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


def accumulate_losses(accelerator: Accelerator, model: nn.Module, micro_batches: Sequence[MicroBatch]) -> StepLosses:
    """Adds up the gradients of a step's micro-batches; ranks exchange them once, after the last.

    Data-parallel wrappers average over ranks, so each rank divides its sum by the valid tokens per rank. Of rows that
    several processes read this counts every copy, and divides by every copy. The model sums, and the division is done
    here: FSDP2 casts every float tensor among a model's arguments to the precision of its layers, in which the number
    of tokens is rounded (bfloat16) or infinite (float16).
    """
    targets = torch.stack([count_targets(batch["labels"]) for batch in micro_batches])
    targets_per_rank = accelerator.reduce(targets.sum().to(accelerator.device), reduction="sum")
    targets_per_rank = targets_per_rank / accelerator.num_processes
    divisor = targets_per_rank.clamp(min=1 / accelerator.num_processes)  # a step without any has no loss, not NaN
    shares = []
    for position, batch in enumerate(micro_batches):
        is_last = position == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            loss_sum = model(
                **on_device(batch, accelerator.device),
                num_items_in_batch=1,
                return_logits=False,
                use_cache=False,
            ).loss
            loss = loss_sum / divisor
            accelerator.backward(loss)
        shares.append(loss.detach())
    return StepLosses(torch.stack(shares), targets, targets_per_rank)


def count_targets(labels_BT: Tensor) -> Tensor:
    """How many tokens of unshifted labels are predicted: the model shifts, so a row's first never is."""
    return (labels_BT[:, 1:] != -100).sum()


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float | None) -> float:
    """Scales the gradients down to ``max_norm`` and returns their norm before that."""
    return float(accelerator.clip_grad_norm_(model.parameters(), float("inf") if max_norm is None else max_norm))
