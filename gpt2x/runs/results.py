"""What a run's directory says of its model, and the evaluations that are added to it."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from gpt2x.addresses import without_secrets
from gpt2x.files import DamagedError, checked, read_json, read_records, read_yaml, write_file
from gpt2x.runs.layout import RunLayout, run_of


class _Recipe(TypedDict):
    data: NotRequired[dict[str, Any]]
    train: NotRequired[dict[str, Any]]
    optimizer: NotRequired[dict[str, Any]]
    init_from: NotRequired[str | None]


class _Stats(TypedDict):
    versions: NotRequired[dict[str, Any]]
    evaluation: NotRequired[dict[str, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files that describe a run; empty for a model directory that stands alone."""

    recipe: dict[str, Any]
    """config.yaml."""
    stats: dict[str, Any]
    """stats.json: the run in numbers."""
    last_values: dict[str, Any]
    """The last value of every key in metrics.jsonl."""
    plots: list[Path]
    """The plots."""

    @classmethod
    def of(cls, directory: Path) -> "RunFiles":
        """Reads a run's directory, or the run that a directory of a model (`final/`, a checkpoint) belongs to.

        A file that is damaged counts as empty, and a line says so: the model does not depend on it.
        """
        run = run_of(directory)
        if run is None:
            return cls(recipe={}, stats={}, last_values={}, plots=[])
        return cls(
            recipe=_or_empty(_recipe, run.config_file),
            stats=_or_empty(_stats, run.stats_file),
            last_values=_or_empty(_last_values, run.metrics_file),
            plots=sorted(run.plots_dir.glob("*.png")),
        )


def _recipe(file: Path) -> dict[str, Any]:
    return cast(dict[str, Any], without_secrets(checked(read_yaml(file), _Recipe, where=str(file))))


def _stats(file: Path) -> dict[str, Any]:
    return cast(dict[str, Any], read_json(file, _Stats))


def _last_values(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for record in read_records(file, dict[str, Any]):
        values |= {key: value for key, value in record.items() if value is not None}
    return values


def _or_empty(read: Callable[[Path], dict[str, Any]], file: Path) -> dict[str, Any]:
    if not os.path.lexists(file):
        return {}
    try:
        return read(file)
    except DamagedError as error:
        print(f"passed over: {error}", file=sys.stderr)
        return {}


def record_results(model_dir: str, results: Mapping[str, Mapping[str, Any]]) -> Path | None:
    """Adds results to the "evaluation" of a finished run's stats.json; one of the same name is replaced.

    Args:
        model_dir: the directory of the model that was evaluated. Only a run's ``final`` stands for the run.
        results: by name of the evaluation.

    Returns:
        The file, or None where the model is not the final one of a finished run; a damaged file is told.
    """
    directory = Path(model_dir).resolve()
    run = RunLayout(directory.parent)
    if directory != run.final_dir or not run.stats_file.exists():
        return None
    try:
        stats = _stats(run.stats_file)
    except DamagedError as error:
        print(f"the results are not recorded: {error}", file=sys.stderr)
        return None
    stats["evaluation"] = stats.get("evaluation", {}) | dict(results)
    write_file(run.stats_file, (json.dumps(stats, indent=2) + "\n").encode())
    return run.stats_file


def recorded_results(stats_file: Path) -> dict[str, Any]:
    """The "evaluation" of a stats.json; empty where there is none."""
    try:
        return cast(dict[str, Any], _stats(stats_file).get("evaluation", {}))
    except DamagedError:
        return {}
