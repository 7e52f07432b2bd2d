"""Where everything of a run lies. No other module spells these names.

runs/NAME/
    config.yaml               the resolved recipe
    metrics.jsonl             one JSON object per record
    samples.jsonl             one per sampled text
    spikes.jsonl              one per step whose loss was out of the ordinary
    checkpoints/step-000100/  model/, state/ and a manifest; see gpt2x.checkpoints.format
    final/                    the trained model
    losses.npy                the recorded training losses in order
    plots/                    one PNG per quantity
    stats.json                the run in numbers, by which it is finished; written last
    run.lock, run.lease       while a process writes there, and after a kill
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gpt2x.errors import UserError

# Inside a checkpoint.
MODEL = "model"
OPTIMIZER = "state/optimizer.safetensors"
TRAINER = "state/trainer.json"

LOCK_NAMES = ("run.lock", "run.lease")
_CHECKPOINTS, _FINAL = "checkpoints", "final"
_STEP = re.compile(r"step-([0-9]{6}|[1-9][0-9]{6,17})")


@dataclass(frozen=True)
class RunLayout:
    """The places of a run's files, whether they are there or not.

    Attributes:
        path: ``runs/NAME``.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved recipe, by which a directory is known to be a run's."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """Losses, rates, validations, by step."""
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        """Sampled texts, by step."""
        return self.path / "samples.jsonl"

    @property
    def spikes_file(self) -> Path:
        """Steps whose loss was out of the ordinary."""
        return self.path / "spikes.jsonl"

    @property
    def record_files(self) -> tuple[Path, ...]:
        """What is appended to while the run goes on."""
        return self.metrics_file, self.samples_file, self.spikes_file

    @property
    def checkpoints_dir(self) -> Path:
        """Its being there says that no checkpoints were removed."""
        return self.path / _CHECKPOINTS

    @property
    def final_dir(self) -> Path:
        """The trained model."""
        return self.path / _FINAL

    @property
    def losses_file(self) -> Path:
        """The recorded training losses in order; written when the run is finished."""
        return self.path / "losses.npy"

    @property
    def plots_dir(self) -> Path:
        """One PNG per quantity."""
        return self.path / "plots"

    @property
    def stats_file(self) -> Path:
        """The run in numbers; written when it is finished, after everything else."""
        return self.path / "stats.json"


def run_of(directory: Path) -> RunLayout | None:
    """The run that a directory is, or whose final model or checkpoint's model it is; None where there is none."""
    place = directory.resolve()
    homes = [place]
    if place.name == _FINAL:
        homes.append(place.parent)
    if place.name == MODEL and place.parent.parent.name == _CHECKPOINTS:
        homes.append(place.parents[2])
    return next((run for run in map(RunLayout, homes) if os.path.lexists(run.config_file)), None)


def name_of(directory: Path) -> str:
    """What the model of a directory is called: inside a run as the run, else as the directory."""
    while directory.name in (_FINAL, MODEL, _CHECKPOINTS) or directory.parent.name == _CHECKPOINTS:
        directory = directory.parent
    return directory.name


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return RunLayout(run_dir).checkpoints_dir / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is named after."""
    found = _STEP.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def named_checkpoints(run_dir: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, whole or not, oldest first.

    Raises:
        UserError: where the directory of checkpoints cannot be read.
    """
    directory = RunLayout(run_dir).checkpoints_dir
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{directory} cannot be read ({error.strerror}); mend that, and the same command goes on."
        ) from error
    return sorted((directory / name for name in names if _STEP.fullmatch(name)), key=step_of)
