"""Scaled gradients (fp16) under several optimizers: one decision and one change of the scale per step.

accelerate's wrapper of an optimizer changes the scale itself: of Muon and its AdamW the second would divide gradients
by the scale once more, leave its step out or not without regard to the first, and count every step twice.
"""

from accelerate.optimizer import AcceleratedOptimizer
from torch.amp import GradScaler
from torch.optim import Optimizer

# Gradients that overflow without being scaled up would overflow at any scale (Megatron-LM stops there as well).
MIN_SCALE = 1.0


def settle_scale(scaler: GradScaler, *, is_kept: bool) -> None:
    """Ends a step whose gradients have been unscaled: lowers the scale where one was not finite, else counts it.

    Args:
        scaler: of the accelerator, whose clipping has unscaled the gradients of all optimizers.
        is_kept: whether the scale stays as it is, of a step that the scale has nothing to do with.
    """
    before = scaler.state_dict() if is_kept else None
    scaler.update()  # in any case, since it forgets that the gradients are unscaled
    if before is not None:
        scaler.load_state_dict(before)


def without_scaler(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper where that has a scaler, else the one that was given."""
    if isinstance(optimizer, AcceleratedOptimizer) and optimizer.scaler is not None:
        return optimizer.optimizer
    return optimizer
