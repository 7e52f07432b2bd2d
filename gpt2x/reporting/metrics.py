"""Reads the records that a run leaves in its directory."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import TypedDict

from gpt2x.errors import UserError
from gpt2x.files import DamagedError, read_records
from gpt2x.runs.layout import RunLayout

logger = logging.getLogger(__name__)


class Metrics(TypedDict):
    """A line of metrics.jsonl, beside whatever was measured."""

    step: Annotated[int, Field(ge=0, lt=2**63)]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, in the order they were written.

    A record holds `step` and the keys known at that step (`train/loss`, `val/loss`, `tokens_per_s`, ...). What is no
    record, as the line that a killed run left half-written, is passed over with a warning.

    Raises:
        UserError: where the run has no readable metrics.jsonl.
    """
    file = RunLayout(run_dir).metrics_file
    if not file.exists():
        raise UserError(f"{file} does not exist; give the directory of a run, runs/NAME.")
    damaged: list[str] = []
    try:
        records = list(read_records(file, Metrics, tell=damaged.append))
    except DamagedError as error:
        raise UserError(f"{error}; give the directory of a run, runs/NAME.") from error
    if damaged:
        more = f", and {len(damaged) - 1} more" if damaged[1:] else ""
        logger.warning("passed over a damaged record: %s%s", damaged[0], more)
    return [dict(record) for record in records]


def column(metrics: Sequence[dict[str, Any]], key: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The steps at which a number was recorded, ascending, and its values there.

    Where a step was recorded twice, by a run that was stopped and took up its last checkpoint, the later one counts.
    """
    value_at = {record["step"]: record[key] for record in metrics if _is_number(record.get(key))}
    steps = sorted(value_at)
    return np.array(steps, dtype=np.int64), np.array([value_at[step] for step in steps], dtype=np.float64)


def _is_number(value: Any) -> bool:
    """Whether a value has a place in float64; integers may be too large."""
    return isinstance(value, int | float) and -1.7e308 < value < 1.7e308
