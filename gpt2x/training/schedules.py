"""Learning-rate schedules: pure functions of the progress through the budget."""

import math
from collections.abc import Callable, Mapping

from gpt2x.config import OptimizerSection


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
