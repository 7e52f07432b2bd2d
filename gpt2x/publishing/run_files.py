"""What a run's directory says of its model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gpt2x.addresses import without_secrets
from gpt2x.reporting import read_metrics


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
        """Reads a run's directory, or the run that a directory of a model (`final/`, a checkpoint) belongs to."""
        run_dir = next((path for path in _homes(directory.resolve()) if (path / "config.yaml").is_file()), None)
        if run_dir is None:
            return cls(recipe={}, stats={}, last_values={}, plots=[])
        stats_file = run_dir / "stats.json"
        last_values: dict[str, Any] = {}
        if (run_dir / "metrics.jsonl").is_file():
            for record in read_metrics(run_dir):
                last_values |= {key: value for key, value in record.items() if value is not None}
        return cls(
            recipe=without_secrets(yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))),
            stats=json.loads(stats_file.read_text()) if stats_file.is_file() else {},
            last_values=last_values,
            plots=sorted((run_dir / "plots").glob("*.png")),
        )


def _homes(directory: Path) -> list[Path]:
    """Where the run of a directory may be: itself, above `final/`, above `checkpoints/step-N/model/`."""
    homes = [directory]
    if directory.name == "final":
        homes.append(directory.parent)
    if directory.name == "model" and directory.parent.parent.name == "checkpoints":
        homes.append(directory.parents[2])
    return homes
