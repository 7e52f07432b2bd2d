"""Which checkpoints are kept."""

import math
from dataclasses import dataclass
from pathlib import Path

from gpt2x.checkpoints.format import TrainerState, list_checkpoints, read_trainer, remove_checkpoints
from gpt2x.checkpoints.progress import Progress
from gpt2x.config import TrainSection
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, tell_once
from gpt2x.runs.layout import step_of


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The rules of a run.

    Attributes:
        newest: how many of the newest are kept; None for all.
        every: checkpoints whose step is a multiple of this are kept for ever; None for none.
        keeps_best: whether the one of the lowest validation loss is kept.
    """

    newest: int | None
    every: int | None = None
    keeps_best: bool = False

    @classmethod
    def of(cls, train: TrainSection) -> "Retention":
        """The rules of a recipe."""
        return cls(newest=train.save_total_limit, every=train.keep_steps, keeps_best=train.save_best)

    def prune(self, run_dir: Path, trainer: TrainerState) -> None:
        """Deletes what the rules do not keep, and what killed saves left behind.

        The last checkpoint before a decay of the learning rate is kept always, since a larger budget goes on from
        there; those of a decay that is no longer the run's are deleted. What cannot be read or deleted stays.

        Args:
            run_dir: the run's.
            trainer: what the newest checkpoint holds beside tensors.
        """
        decays = _decays(run_dir)
        ours = [path for path, decay in decays.items() if is_of_this_decay(decay, trainer.get("decays_to"))]
        kept = set(ours if self.newest is None else ours[-self.newest :])
        kept |= set([path for path in ours if decays[path] is None][-1:])
        if self.every is not None:
            kept |= {path for path in ours if step_of(path) % self.every == 0}
        if self.keeps_best:
            kept |= {path for path in ours if step_of(path) == trainer.get("best_step")}
        remove_checkpoints(run_dir, [path for path in decays if path not in kept])


def _decays(run_dir: Path) -> dict[Path, float | None]:
    """The budget that the learning rate of each checkpoint decays to, oldest first, without those that cannot be
    read, which is told once."""
    decays: dict[Path, float | None] = {}
    try:
        for checkpoint in list_checkpoints(run_dir):
            try:
                decays[checkpoint] = read_trainer(checkpoint).get("decays_to")
            except DamagedError as error:
                tell_once(f"{checkpoint} is damaged ({error}); it is left as it is.")
    except UserError as error:
        tell_once(str(error))
    return decays


def is_of_this_decay(saved: float | None, now: float | None) -> bool:
    """Whether a checkpoint is one of a run that decays towards a budget, or does not decay yet."""
    return saved is None or saved == now


def note_validation(progress: Progress, loss: float) -> bool:
    """Remembers the step of the lowest validation loss; True where this is it. One that is not finite never is."""
    best = progress.best_val_loss
    is_best = math.isfinite(loss) and (best is None or loss < best)
    if is_best:
        progress.best_val_loss, progress.best_step = loss, progress.step
    return is_best
