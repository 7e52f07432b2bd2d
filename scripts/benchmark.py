"""Measures gpt2x against its peers: `python scripts/benchmark.py NAME [--OPTION VALUE ...]`, alone on the machine."""

import importlib
import sys
from pathlib import Path

from gpt2x.errors import exit_on_user_error
from gpt2x.prerequisites import check_installed

BENCHMARKS = ("attention", "checkpoint", "data", "generate", "hellaswag", "race", "train")


def main(argv: list[str]) -> int:
    """Hands over to the benchmark of that name."""
    if not argv or argv[0] not in BENCHMARKS:
        asked = f"{argv[0]!r} is no benchmark; " if argv else ""
        print(f"error: {asked}name one of {', '.join(BENCHMARKS)}.", file=sys.stderr)
        return 2
    sys.path.insert(0, str(Path(__file__).parent.parent))
    with exit_on_user_error():
        if argv[0] == "hellaswag":
            check_installed("eval", what="benchmark.py hellaswag")
        importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
