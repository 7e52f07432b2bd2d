"""Which checkpoints are kept."""

import math
from pathlib import Path

from gpt2x.checkpoints.format import TrainerState, list_checkpoints, read_trainer, remove_checkpoints
from gpt2x.checkpoints.progress import Progress
from gpt2x.config import TrainSection
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, tell_once
from gpt2x.runs.layout import step_of


def prune(run_dir: Path, trainer: TrainerState, rules: TrainSection) -> None:
    """Deletes what the rules of a recipe do not keep, and what killed saves left behind.

    The last checkpoint before a decay of the learning rate is kept always, since a larger budget goes on from there;
    those of a decay that is no longer the run's are deleted. What cannot be read or deleted stays.

    Args:
        run_dir: the run's.
        trainer: what the newest checkpoint holds beside tensors.
        rules: save_total_limit, keep_steps and save_best.
    """
    decays = _decays(run_dir)
    ours = [path for path, decay in decays.items() if is_of_this_decay(decay, trainer.get("decays_to"))]
    kept = set(ours if rules.save_total_limit is None else ours[-rules.save_total_limit :])
    kept |= set([path for path in ours if decays[path] is None][-1:])
    if rules.keep_steps is not None:
        kept |= {path for path in ours if step_of(path) % rules.keep_steps == 0}
    if rules.save_best:
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
