"""Contestants in processes of their own, by turns, on one machine.

A contestant is ``python -m benchmarks.NAME CONTESTANT [ARGUMENTS]``, which prints one JSON object as its last line.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def interleave(module: str, contestants: Sequence[str], arguments: Sequence[str], *, rounds: int) -> dict[str, dict]:
    """Runs every contestant once per round and takes the median of each figure.

    Returns:
        Per contestant the medians of its numbers; figures that are no numbers are those of the last round.
    """
    results: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in contestants}
    for round_number in range(1, rounds + 1):
        for contestant in contestants:
            results[contestant].append(_run(module, contestant, arguments))
            print(f"round {round_number}: {contestant}: {results[contestant][-1]}", file=sys.stderr, flush=True)
    return {contestant: _medians(found) for contestant, found in results.items()}


def _run(module: str, contestant: str, arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{module}", contestant, *arguments]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def _medians(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        key: statistics.median(result[key] for result in found) if isinstance(value, int | float) else value
        for key, value in found[-1].items()
    }


def print_table(results: Mapping[str, Mapping[str, float]], *, against: str) -> None:
    """Prints every figure of every contestant, and its ratio to that of one of them."""
    figures = list(next(iter(results.values())))
    print("  ".join([f"{'':18s}", *(f"{figure:>28s}" for figure in figures)]))
    for contestant, result in results.items():
        cells = [f"{result[key]:14,.4g} ({result[key] / results[against][key]:9.3f} x)" for key in figures]
        print("  ".join([f"{contestant:18s}", *(f"{cell:>28s}" for cell in cells)]))
