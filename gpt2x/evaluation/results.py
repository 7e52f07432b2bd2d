"""Results of evaluations in the stats.json of the run that made the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2x.files import write_file


def record_results(model_dir: str, results: Mapping[str, Mapping[str, Any]]) -> Path | None:
    """Adds results to the "evaluation" of a finished run's stats.json; one of the same name is replaced.

    Args:
        model_dir: the directory of the model that was evaluated. Only a run's ``final`` stands for the run.
        results: by name of the evaluation.

    Returns:
        The file, or None where the model is not the final one of a finished run.
    """
    directory = Path(model_dir).resolve()
    stats_file = directory.parent / "stats.json"
    if directory.name != "final" or not stats_file.is_file():
        return None
    stats = json.loads(stats_file.read_bytes())
    stats["evaluation"] = stats.get("evaluation", {}) | results
    write_file(stats_file, (json.dumps(stats, indent=2) + "\n").encode())
    return stats_file
