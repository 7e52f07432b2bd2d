"""Results of evaluations in the stats.json of the run that made the model."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from gpt2x.files import DamagedError, read_json, write_file


class Stats(TypedDict, total=False):
    """stats.json as far as evaluations go."""

    evaluation: dict[str, Any]


def record_results(model_dir: str, results: Mapping[str, Mapping[str, Any]]) -> Path | None:
    """Adds results to the "evaluation" of a finished run's stats.json; one of the same name is replaced.

    Args:
        model_dir: the directory of the model that was evaluated. Only a run's ``final`` stands for the run.
        results: by name of the evaluation.

    Returns:
        The file, or None where the model is not the final one of a finished run; a damaged file is told.
    """
    directory = Path(model_dir).resolve()
    stats_file = directory.parent / "stats.json"
    if directory.name != "final" or not stats_file.exists():
        return None
    try:
        stats = read_json(stats_file, Stats)
    except DamagedError as error:
        print(f"the results are not recorded: {error}", file=sys.stderr)
        return None
    stats["evaluation"] = stats.get("evaluation", {}) | dict(results)
    write_file(stats_file, (json.dumps(stats, indent=2) + "\n").encode())
    return stats_file


def recorded_results(stats_file: Path) -> dict[str, Any]:
    """The "evaluation" of a stats.json; empty where there is none."""
    try:
        return read_json(stats_file, Stats).get("evaluation", {})
    except DamagedError:
        return {}
