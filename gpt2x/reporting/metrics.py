"""Reads the records that a run leaves in its directory."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2x.errors import UserError

logger = logging.getLogger(__name__)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, in the order they were written.

    A record holds `step` and the keys known at that step (`train/loss`, `val/loss`, `tokens_per_s`, ...). A last line
    that a killed run left half-written is ignored with a warning.

    Raises:
        UserError: where the run has no metrics.jsonl, or another line than the last is no record.
    """
    metrics_file = run_dir / "metrics.jsonl"
    if not metrics_file.is_file():
        raise UserError(f"{metrics_file} does not exist; give the directory of a run, runs/NAME.")
    lines = [line for line in metrics_file.read_bytes().split(b"\n") if line.strip()]
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except ValueError as error:  # JSON cut short, or cut inside a character
            if number < len(lines):
                raise UserError(f"{metrics_file} record {number} is not JSON; remove that line.") from error
            logger.warning("%s: ignored the last record, which is half-written.", metrics_file)
    return metrics


def column(metrics: Sequence[dict[str, Any]], key: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The steps at which a key was recorded, ascending, and its values there.

    Where a step was recorded twice, by a run that was stopped and took up its last checkpoint, the later one counts.
    """
    value_at = {record["step"]: record[key] for record in metrics if record.get(key) is not None}
    steps = sorted(value_at)
    return np.array(steps, dtype=np.int64), np.array([value_at[step] for step in steps], dtype=np.float64)
