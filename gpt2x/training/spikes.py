"""Losses out of the ordinary, and the samples that were trained on when they came."""

import bisect
import math
import statistics
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from gpt2x.checkpoints.progress import Progress
from gpt2x.distributed.ranks import data_rank
from gpt2x.training.job import Job

WINDOW = 128
MIN_LOSSES = 32
# A spike lies this many standard deviations above the median; OLMo (arXiv:2501.00656, section 3.1) takes the same.
NUM_DEVIATIONS = 6.0
# Of a normal distribution, the standard deviation is this many median absolute deviations.
_PER_MEDIAN_DEVIATION = 1.4826
MAX_LISTED = 16


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


class SpikeDetector:
    """Compares a loss with the median of the last ones, by their median absolute deviation.

    Both stay put when a few losses are wild, so that a spike does not hide the next one.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss lies far above the last ones, among which it is counted from then on."""
        found = (
            len(self._recent) >= MIN_LOSSES
            # what a twentieth of the recent losses exceed is no spike, and most steps end here
            and loss > self._sorted[len(self._sorted) * 19 // 20]
            and loss > self.median() + NUM_DEVIATIONS * self.deviation()
        )
        self._count(loss)
        return found

    def median(self) -> float:
        """Of the last losses."""
        return self._sorted[len(self._sorted) // 2] if self._sorted else math.nan

    def deviation(self) -> float:
        """Their standard deviation, estimated from the median absolute deviation."""
        median = self.median()
        spread = statistics.median(abs(loss - median) for loss in self._recent) if self._recent else math.nan
        return _PER_MEDIAN_DEVIATION * spread

    def _count(self, loss: float) -> None:
        if len(self._recent) == WINDOW:
            oldest = self._recent.popleft()
            del self._sorted[bisect.bisect_left(self._sorted, oldest)]
        self._recent.append(loss)
        bisect.insort(self._sorted, loss)


class Suspect(NamedTuple):
    """A micro-batch that may be the cause."""

    rank: int
    first: int
    last: int
    mean_loss: float


def suspects(job: Job, losses: StepLosses) -> list[Suspect]:
    """The micro-batches of all ranks whose loss is not finite, or else the one of the highest.

    Must be called by all ranks. The places are those of the step's whole batch, from which
    ``TrainingBatches.locate`` finds the source.
    """
    means_A = losses.means()
    gathered_WA = job.accelerator.gather(means_A).reshape(-1, len(means_A)).tolist()
    found = []
    for rank, means in enumerate(gathered_WA[:: data_rank(job.accelerator).num_copies]):
        for number, mean in enumerate(means):
            size = job.recipe.train.micro_batch_size
            first = (rank * len(means) + number) * size
            if mean != -math.inf:
                found.append(Suspect(rank, first, first + size - 1, mean))
    wild = [suspect for suspect in found if not math.isfinite(suspect.mean_loss)]
    return wild or [max(found, key=lambda suspect: suspect.mean_loss)]


def record_spike(
    job: Job, progress: Progress, found: list[Suspect], *, reason: str, detector: SpikeDetector, loss: float
) -> None:
    """Appends to spikes.jsonl what happened in the coming step, and where its samples were read; main process.

    ``batch`` is the number by which ``data.skip`` passes over the whole batch.
    """
    line = {
        "step": progress.step + 1,
        "batch": job.batches.batches.order.batch_of(progress.step),
        "reason": reason,
        "loss": loss if math.isfinite(loss) else None,
        "median": _finite(detector.median()),
        "deviation": _finite(detector.deviation()),
        "suspects": [_described(job, progress, suspect) for suspect in found],
    }
    job.run.append(job.run.spikes_file, line)


def _described(job: Job, progress: Progress, suspect: Suspect) -> dict[str, Any]:
    return {
        "rank": suspect.rank,
        "places": [suspect.first, suspect.last],
        "mean_loss": _finite(suspect.mean_loss),
        "samples": list(located(job, progress, suspect)),
    }


def located(job: Job, progress: Progress, suspect: Suspect) -> Iterator[str]:
    """Where the samples of a suspect were read, a line each."""
    last = min(suspect.last, suspect.first + MAX_LISTED - 1)
    return (job.batches.batches.locate(progress.step, place) for place in range(suspect.first, last + 1))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
