"""How far a run goes, in optimizer steps, in tokens or by the clock, and the learning rates on the way."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gpt2x.checkpoints.progress import Progress
from gpt2x.config import OptimizerSection, TrainSection


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The end of a run, and how far a step is on the way to it.

    Attributes:
        max_steps: optimizer steps of a step or token budget, else None.
        max_time_s: seconds of training of a time budget, else None.
        warmup_steps: optimizer steps of linear warmup.
    """

    max_steps: int | None
    max_time_s: float | None
    warmup_steps: int

    @property
    def size(self) -> float:
        """Steps, or seconds."""
        size = self.max_time_s if self.max_steps is None else self.max_steps
        assert size is not None
        return size

    def is_spent(self, progress: Progress) -> bool:
        """Whether the run is over. A time budget ends before the step that would overrun it."""
        if self.max_steps is not None:
            return progress.step >= self.max_steps
        assert self.max_time_s is not None
        return progress.elapsed_s + progress.step_s > self.max_time_s

    def warmup(self, progress: Progress) -> float:
        """How much of the warmup the coming step completes, at least 1 once it is over."""
        return (progress.step + 1) / self.warmup_steps if self.warmup_steps else 1.0

    def decay(self, progress: Progress) -> float:
        """The share, in [0, 1), of the budget after warmup that is spent before the coming step.

        By the clock the decay spans the whole budget, since nobody knows how many seconds a warmup takes.
        """
        if self.max_steps is not None:
            return max(progress.step - self.warmup_steps, 0) / max(self.max_steps - self.warmup_steps, 1)
        assert self.max_time_s is not None
        return progress.elapsed_s / self.max_time_s

    def remaining_s(self, progress: Progress) -> float:
        """Seconds of training left, estimated from the mean step so far where steps are counted."""
        if self.max_time_s is not None:
            return max(self.max_time_s - progress.elapsed_s, 0.0)
        assert self.max_steps is not None
        return (self.max_steps - progress.step) * progress.elapsed_s / max(progress.step, 1)


def make_budget(train: TrainSection, schedule: OptimizerSection, *, steps_per_epoch: float | None = None) -> Budget:
    """The budget of a recipe; one in tokens or epochs is rounded up to whole steps.

    Args:
        train: the budget and the batch.
        schedule: the warmup.
        steps_per_epoch: needed for a budget in epochs.
    """
    warmup = schedule.warmup_steps
    if train.max_time_s is not None:
        return Budget(max_steps=None, max_time_s=train.max_time_s, warmup_steps=int(warmup))
    if train.num_train_epochs is not None:
        assert steps_per_epoch is not None
        max_steps = math.ceil(train.num_train_epochs * steps_per_epoch)
    else:
        max_steps = train.max_steps or math.ceil((train.max_tokens or 0) / train.tokens_per_step)
    warmup_steps = round(warmup * max_steps) if warmup < 1 else min(int(warmup), max_steps)
    return Budget(max_steps=max_steps, max_time_s=None, warmup_steps=warmup_steps)


def _cosine(progress: float, _decay_ratio: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float, _decay_ratio: float) -> float:
    return 1 - progress


def _wsd(progress: float, decay_ratio: float) -> float:
    """Stable, then a linear decay over the last decay_ratio (arXiv:2405.18392, section 4)."""
    return min(1.0, (1 - progress) / decay_ratio) if decay_ratio > 0 else 1.0


_DECAYS: Mapping[str, Callable[[float, float], float]] = {"cosine": _cosine, "linear": _linear, "wsd": _wsd}


def learning_rate_factor(schedule: OptimizerSection, *, warmup: float, progress: float) -> float:
    """The share of the peak learning rate that holds in an optimizer step.

    Args:
        schedule: the shape of the decay and its floor.
        warmup: how much of the warmup the step completes, 1 where there is none or it is over.
        progress: the share of the budget after warmup that is spent when the step starts, in [0, 1].

    Returns:
        A factor that rises linearly during warmup and falls to ``min_lr_ratio`` as progress reaches 1.
    """
    decayed = _DECAYS[schedule.lr_scheduler_type](min(max(progress, 0.0), 1.0), schedule.decay_ratio)
    return min(warmup, 1.0) * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * decayed)
