"""Steps out of the ordinary: losses far above the others, losses that are none, and the end of a run over them."""

import bisect
import math
import os
import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from gpt2x.checkpoints.state import first_not_finite, not_saved, optimizer_tensors
from gpt2x.distributed.ranks import Vote, agree, data_rank, wait_for_main
from gpt2x.errors import UserError
from gpt2x.evaluation.validation import validate
from gpt2x.files import set_aside
from gpt2x.runs.layout import checkpoint_dir
from gpt2x.training.steps import NO_TARGETS, StepLosses, StepOutcome
from gpt2x.training.trainer import Trainer

WINDOW = 128
MIN_LOSSES = 32
# A spike lies this many standard deviations above the median; OLMo (arXiv:2501.00656, section 3.1) takes the same.
NUM_DEVIATIONS = 6.0
# Of a normal distribution, the standard deviation is this many median absolute deviations.
_PER_MEDIAN_DEVIATION = 1.4826
MAX_LISTED = 16


class SpikeDetector:
    """Compares a loss with the median of the last ones, by their median absolute deviation.

    Both stay put when a few losses are wild, so that a spike does not hide the next one.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss lies far above the last ones."""
        return (
            len(self._recent) >= MIN_LOSSES
            # what a twentieth of the recent losses exceed is no spike, and most steps end here
            and loss > self._sorted[len(self._sorted) * 19 // 20]
            and loss > self.median() + NUM_DEVIATIONS * self.deviation()
        )

    def count(self, loss: float) -> None:
        """Counts a finite loss among the last ones."""
        if len(self._recent) == WINDOW:
            oldest = self._recent.popleft()
            del self._sorted[bisect.bisect_left(self._sorted, oldest)]
        self._recent.append(loss)
        bisect.insort(self._sorted, loss)

    def median(self) -> float:
        """Of the last losses."""
        return self._sorted[len(self._sorted) // 2] if self._sorted else math.nan

    def deviation(self) -> float:
        """Their standard deviation, estimated from the median absolute deviation."""
        median = self.median()
        spread = statistics.median(abs(loss - median) for loss in self._recent) if self._recent else math.nan
        return _PER_MEDIAN_DEVIATION * spread


class Suspect(NamedTuple):
    """A micro-batch that may be the cause."""

    rank: int
    first: int
    last: int
    mean_loss: float


def suspects(trainer: Trainer, losses: StepLosses) -> list[Suspect]:
    """The micro-batches of all ranks whose loss is not finite, or else the one of the highest.

    Must be called by all ranks. The places are those of the step's whole batch, from which
    ``TrainingBatches.locate`` finds the source.
    """
    means_A = losses.means()
    gathered_WA = trainer.accelerator.gather(means_A).reshape(-1, len(means_A)).tolist()
    found = []
    for rank, means in enumerate(gathered_WA[:: data_rank(trainer.accelerator).num_copies]):
        for number, mean in enumerate(means):
            size = trainer.recipe.train.micro_batch_size
            first = (rank * len(means) + number) * size
            if mean != -math.inf:
                found.append(Suspect(rank, first, first + size - 1, mean))
    wild = [suspect for suspect in found if not math.isfinite(suspect.mean_loss)]
    return wild or [max(found, key=lambda suspect: suspect.mean_loss)]


def _located(trainer: Trainer, suspect: Suspect) -> Iterator[str]:
    """Where the samples of a suspect were read, a line each."""
    last = min(suspect.last, suspect.first + MAX_LISTED - 1)
    return (trainer.batches.batches.locate(trainer.progress.step, place) for place in range(suspect.first, last + 1))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def handle_incident(trainer: Trainer, outcome: StepOutcome, detector: SpikeDetector, *, is_spike: bool) -> None:
    """Writes down a step that is out of the ordinary, on all ranks together.

    Raises:
        UserError: where the run must not go on; what it was before the step is saved where that is sound.
    """
    progress, train = trainer.progress, trainer.recipe.train
    if outcome.obstacle is None:
        progress.skipped_in_a_row = 0
        trainer.saver.confirm(progress.step, best_step=progress.best_step)
        detector.count(outcome.metrics["train/loss"])
        if is_spike:
            record_spike(trainer, outcome, detector, reason="loss spike")
        return
    if outcome.obstacle != NO_TARGETS:
        found = record_spike(trainer, outcome, detector, reason=outcome.obstacle)
        if train.on_non_finite == "stop" or progress.skipped_in_a_row >= train.max_skipped_steps:
            raise _stopped_by(trainer, outcome.obstacle, found[0])
        progress.skipped_in_a_row += 1
    progress.skipped_steps += 1


def record_spike(trainer: Trainer, outcome: StepOutcome, detector: SpikeDetector, *, reason: str) -> list[Suspect]:
    """Appends to spikes.jsonl what happened in the coming step, and where its samples were read; all ranks call it.

    ``batch`` is the number by which ``data.skip`` passes over the whole batch.
    """
    found = suspects(trainer, outcome.losses)
    if trainer.accelerator.is_main_process:
        step = trainer.progress.step
        line = {
            "step": step + 1,
            "batch": trainer.batches.batches.order.batch_of(step),
            "reason": reason,
            "loss": _finite(outcome.metrics["train/loss"]),
            "median": _finite(detector.median()),
            "deviation": _finite(detector.deviation()),
            "suspects": [
                {
                    "rank": suspect.rank,
                    "places": [suspect.first, suspect.last],
                    "mean_loss": _finite(suspect.mean_loss),
                    "samples": list(_located(trainer, suspect)),
                }
                for suspect in found
            ],
        }
        trainer.run.append(trainer.run.spikes_file, line)
    return found


# --- the end of a run ------------------------------------------------------------------------------------------------


def _stopped_by(trainer: Trainer, obstacle: str, first: Suspect) -> UserError:
    """The end of a run before a step that is not finite, for which the step is to blame, or the weights before it."""
    train, progress = trainer.recipe.train, trainer.progress
    batch = trainer.batches.batches.order.batch_of(progress.step)
    remedy = f"lower the learning rate, or pass over the batch by --data.skip {batch}, both with --resume"
    if train.on_non_finite == "skip":
        obstacle += f", after {progress.skipped_in_a_row} such steps in a row (train.max_skipped_steps)"
    else:
        remedy += "; or set train.on_non_finite skip"
    reason = (
        f"step {progress.step + 1}: {obstacle} on rank {first.rank}, samples {first.first} to {first.last} of batch "
        f"{batch}, from {next(_located(trainer, first))} on ({trainer.run.spikes_file} has them all)"
    )
    unsound = find_unsound(trainer)
    if unsound is not None:
        return give_up(trainer, f"{reason}, and the weights before it are not sound: {unsound}")
    trainer.save(is_last=True)
    trainer.finish_saving()
    return UserError(f"{reason}; the state before the step is saved: {remedy}.")


def find_unsound(trainer: Trainer) -> str | None:
    """What speaks against the present state, the same on all ranks, which must all ask; None where nothing does.

    Weights and optimizer state must be finite, and so must the loss of a validation batch: weights may be finite and
    so large that no loss is.
    """
    name = first_not_finite(_local_tensors(trainer))
    if agree(trainer.accelerator, Vote(stops=name is not None)).stops:
        return f"{name or 'a part on another process'} is not finite"
    (batch,) = islice(trainer.validation_batches, 1)
    whole = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}  # every token counts, so there is a loss
    whole |= {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    validation = validate(trainer.model, [whole], num_bytes={"": 0}, accelerator=trainer.accelerator)
    assert validation is not None
    return None if math.isfinite(validation.loss) else f"the loss of a validation batch is {validation.loss}"


def _local_tensors(trainer: Trainer) -> Iterable[tuple[str, Tensor]]:
    """What lies on this process of weights and optimizer state, by name."""
    optimizer = optimizer_tensors(trainer.optimizers, trainer.parameter_names)
    for name, tensor in chain(trainer.plain_model.named_parameters(), optimizer.items()):
        yield name, (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def give_up(trainer: Trainer, reason: str) -> UserError:
    """The end of a run whose state is not sound, on all ranks together: not saved, and nothing deleted. What was
    saved of this very step, before it was known, is set aside."""
    step = trainer.progress.step
    try:
        trainer.saver.wait()
        if trainer.accelerator.is_main_process:
            trainer.run.check()
            checkpoint = checkpoint_dir(trainer.run.path, step)
            if os.path.lexists(checkpoint):
                reason += f"; {checkpoint} holds it and is set aside as {set_aside(checkpoint).name}"
    finally:
        wait_for_main(trainer.accelerator)
    return UserError(not_saved(trainer.run.path, step, reason))
