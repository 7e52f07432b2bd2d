"""Where a run stands: the few numbers that, beside weights and optimizer state, are all there is to resume."""

from dataclasses import dataclass

import torch


@dataclass
class Progress:
    """What the loop has done so far.

    The data order, the learning rates and the random numbers of a step are pure functions of this and of the recipe,
    so neither an iterator, nor a scheduler, nor a generator's state is ever saved.

    Attributes:
        step: optimizer steps taken.
        tokens: tokens read.
        elapsed_s: seconds spent in steps; validation, samples and saving are not counted.
        step_s: seconds a step takes: the shortest so far, since one that compiles or pauses says nothing about the
            next; 0 until there is a second step.
        is_followed_up: whether the validation and samples due after the last step are made.
        skipped_steps: steps whose update was left out: without tokens to predict, or not finite.
        skipped_in_a_row: how many of the last steps were not finite.
        scaler_skipped_steps: steps left out until the scale of fp16 gradients had come down; not among skipped_steps.
        decays_to: the budget that a warmup-stable-decay schedule decays to; None where it does not decay yet.
        best_val_loss: the lowest validation loss so far.
        best_step: the step it was reached at.
    """

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    step_s: float = 0.0
    is_followed_up: bool = True
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    scaler_skipped_steps: int = 0
    decays_to: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None

    def advance(self, *, tokens: int, seconds: float) -> None:
        """Counts one finished optimizer step."""
        self.step += 1
        self.tokens += tokens
        self.elapsed_s += seconds
        if self.step > 1:
            self.step_s = min(seconds, self.step_s or seconds)
        self.is_followed_up = False

    def left_out(self) -> dict[str, float]:
        """How many steps have moved no weights, by metric, where any have."""
        counts = {"train/skipped_steps": self.skipped_steps, "train/scaler_skipped_steps": self.scaler_skipped_steps}
        return {name: count for name, count in counts.items() if count}


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Seeds torch's generators for one step of one rank.

    With this, dropout in a step depends on (seed, step, rank) alone: not on what was sampled or evaluated before, and
    not on whether the run was resumed.
    """
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**64)
