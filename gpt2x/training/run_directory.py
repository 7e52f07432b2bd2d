"""A run's directory: whether to start, to go on, or to refuse."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gpt2x.config import Recipe, to_yaml
from gpt2x.errors import UserError

# Fields that say how to start, not what to train: two runs that differ in them alone are the same run.
_NOT_PART_OF_A_RUN = ("resume", "run")


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run.

    Attributes:
        path: ``runs/NAME``.
    """

    path: Path

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
    def stats_file(self) -> Path:
        """The run in numbers; written when it is finished."""
        return self.path / "stats.json"

    @property
    def final_dir(self) -> Path:
        """The trained model."""
        return self.path / "final"

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether the budget of this very recipe was spent here; a larger one is not."""
        return self.stats_file.exists() and not _changes(self.recorded_recipe(), _as_recorded(recipe))

    def recorded_recipe(self) -> dict[str, Any]:
        """The recipe that ran here, as plain data."""
        return yaml.safe_load(self.config_file.read_text(encoding="utf-8"))


def open_run_directory(recipe: Recipe, *, name: str) -> RunDirectory:
    """The directory of a run, new or to be gone on with.

    Args:
        recipe: what is to be run.
        name: the run's name where the recipe gives none.

    Raises:
        UserError: where another recipe has run there, with the differences.
    """
    run = RunDirectory(recipe.run.dir / (recipe.run.name or name))
    if run.config_file.exists() and not recipe.resume:
        changes = _changes(run.recorded_recipe(), _as_recorded(recipe))
        if changes and not _is_larger_budget(changes):
            table = "; ".join(f"{field}: {old} -> {new}" for field, (old, new) in changes.items())
            raise UserError(
                f"{run.path} was run with another recipe ({table}); start a new run with --run.name NAME, "
                f"or go on with this one and the changes by --resume true."
            )
    return run


def write_config(run: RunDirectory, recipe: Recipe) -> None:
    """Records the resolved recipe."""
    run.path.mkdir(parents=True, exist_ok=True)
    replace_file(run.config_file, to_yaml(recipe).encode())


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
    for path in (run.metrics_file, run.samples_file):
        if path.exists():
            lines = path.read_bytes().split(b"\n")
            kept = [line for line in lines if _is_kept(line, step, is_followed_up)]
            replace_file(path, b"".join(line + b"\n" for line in kept))


def clear(run: RunDirectory) -> None:
    """Removes what a run without a checkpoint left, so that it starts from nothing."""
    for path in (run.metrics_file, run.samples_file, run.stats_file):
        path.unlink(missing_ok=True)
    shutil.rmtree(run.final_dir, ignore_errors=True)


def _as_recorded(recipe: Recipe) -> dict[str, Any]:
    return yaml.safe_load(to_yaml(recipe))


def _is_kept(line: bytes, step: int, is_followed_up: bool) -> bool:
    """Whether a line is whole and belongs to what counts; a killed run may leave a torn one."""
    try:
        record = json.loads(line)
    except ValueError:  # cut short, or cut inside a character
        return False
    return record["step"] < step or (record["step"] == step and (is_followed_up or "train/loss" in record))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, as (old, new)."""
    before, after = _flat(old), _flat(new)
    fields = [field for field in before | after if field.split(".")[0] not in _NOT_PART_OF_A_RUN]
    fields += ["run.seed"]
    return {field: (before.get(field), after.get(field)) for field in fields if before.get(field) != after.get(field)}


def _is_larger_budget(changes: Mapping[str, tuple[Any, Any]]) -> bool:
    budgets = {"train.max_steps", "train.max_tokens", "train.max_time_s"}
    return set(changes) <= budgets and all(
        old is not None and new is not None and new > old for old, new in changes.values()
    )
