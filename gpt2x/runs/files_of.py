"""What a run's directory says of its model."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from gpt2x.addresses import without_secrets
from gpt2x.files import DamagedError, checked, read_json, read_records, read_yaml


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
        homes = _homes(directory.resolve())
        run_dir = next((path for path in homes if os.path.lexists(path / "config.yaml")), None)
        if run_dir is None:
            return cls(recipe={}, stats={}, last_values={}, plots=[])
        return cls(
            recipe=_or_empty(_recipe, run_dir / "config.yaml"),
            stats=_or_empty(_stats, run_dir / "stats.json"),
            last_values=_or_empty(_last_values, run_dir / "metrics.jsonl"),
            plots=sorted((run_dir / "plots").glob("*.png")),
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


def _homes(directory: Path) -> list[Path]:
    """Where the run of a directory may be: itself, above `final/`, above `checkpoints/step-N/model/`."""
    homes = [directory]
    if directory.name == "final":
        homes.append(directory.parent)
    if directory.name == "model" and directory.parent.parent.name == "checkpoints":
        homes.append(directory.parents[2])
    return homes
