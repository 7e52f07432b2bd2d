"""A run's directory: whether to start, to go on, or to refuse."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from gpt2x.config import TrainingRecipe, to_yaml
from gpt2x.errors import UserError
from gpt2x.training.recipe_changes import Changes, changes_between, changes_of_shape, describe, is_larger_budget


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run.

    Attributes:
        path: ``runs/NAME``.
        changes: fields of the recipe that differ from those it was run with before, as (old, new).
    """

    path: Path
    changes: Changes = field(default_factory=dict)

    @property
    def config_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per record."""
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        """One JSON object per sampled text."""
        return self.path / "samples.jsonl"

    @property
    def spikes_file(self) -> Path:
        """One JSON object per step whose loss was out of the ordinary."""
        return self.path / "spikes.jsonl"

    @property
    def stats_file(self) -> Path:
        """The run in numbers; written when it is finished."""
        return self.path / "stats.json"

    @property
    def final_dir(self) -> Path:
        """The trained model."""
        return self.path / "final"

    def is_finished(self, recipe: TrainingRecipe) -> bool:
        """Whether the budget of this very recipe was spent here; a larger one is not."""
        return self.stats_file.exists() and not changes_between(self.recorded_recipe(), recipe)

    def recorded_recipe(self) -> dict[str, Any]:
        """The recipe that ran here, as plain data."""
        return yaml.safe_load(self.config_file.read_text(encoding="utf-8"))


def open_run_directory(recipe: TrainingRecipe, *, name: str) -> RunDirectory:
    """The directory of a run, new or to be gone on with.

    Args:
        recipe: what is to be run.
        name: the run's name where the recipe gives none.

    Raises:
        UserError: where another recipe has run there, with the differences; where they cannot be gone on with.
    """
    run = RunDirectory(recipe.run.dir / (recipe.run.name or name))
    if not run.config_file.exists():
        return run
    changes = changes_between(run.recorded_recipe(), recipe)
    if changes and not recipe.resume and not is_larger_budget(changes):
        table = "; ".join(describe(changes))
        raise UserError(
            f"{run.path} was run with another recipe ({table}); start a new run with --run.name NAME, "
            f"or go on with this one and the changes by --resume true."
        )
    if shapes := changes_of_shape(changes):
        raise UserError(
            f"{run.path} cannot go on with another model ({'; '.join(describe(shapes))}): its weights would not fit; "
            f"set that back, or start a new run with --run.name NAME."
        )
    return replace(run, changes=changes)


def write_config(run: RunDirectory, recipe: TrainingRecipe) -> None:
    """Records the resolved recipe."""
    run.path.mkdir(parents=True, exist_ok=True)
    replace_file(run.config_file, to_yaml(recipe).encode())


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON object as a line, written in one piece so that a killed run tears at most the last."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that a kill leaves the old content or the new."""
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_bytes(content)
    partial.replace(path)


def truncate_records(run: RunDirectory, *, step: int, is_followed_up: bool) -> None:
    """Drops what was recorded after a step, so that a resumed run writes no step twice.

    Args:
        run: whose records.
        step: the last step that counts.
        is_followed_up: whether its validation and samples count as well, or will be made again.
    """
    run.stats_file.unlink(missing_ok=True)  # the run is no longer finished
    for path in (run.metrics_file, run.samples_file, run.spikes_file):
        if path.exists():
            lines = path.read_bytes().split(b"\n")
            kept = [line for line in lines if _is_kept(line, step, is_followed_up)]
            replace_file(path, b"".join(line + b"\n" for line in kept))


def clear(run: RunDirectory) -> None:
    """Removes what a run without a checkpoint left, so that it starts from nothing."""
    for path in (run.metrics_file, run.samples_file, run.spikes_file, run.stats_file):
        path.unlink(missing_ok=True)
    shutil.rmtree(run.final_dir, ignore_errors=True)


def _is_kept(line: bytes, step: int, is_followed_up: bool) -> bool:
    """Whether a line is whole and belongs to what counts; a killed run may leave a torn one."""
    try:
        record = json.loads(line)
    except ValueError:  # cut short, or cut inside a character
        return False
    belongs_to_step = "train/loss" in record or "suspects" in record
    return record["step"] < step or (record["step"] == step and (is_followed_up or belongs_to_step))
