"""Prepares a corpus: trains its tokenizer where the recipe asks for that, and writes token shards.

python scripts/prepare_data.py --config configuration/data/python-stdlib.yaml
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from gpt2x.command_line import parse_recipe
from gpt2x.config import PreparationRecipe
from gpt2x.errors import exit_on_user_error

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configuration" / "data" / "python-stdlib.yaml"


def main(argv: Sequence[str]) -> None:
    """Runs the preparation that a command line describes."""
    # --- 1. The recipe. What imports transformers waits until it is known to be right ---
    recipe, _ = parse_recipe(PreparationRecipe, argv, script="prepare_data.py", default_config=DEFAULT_CONFIG)
    from gpt2x.shards.preparation import prepare, statistics

    # --- 2. Text to token shards; what is finished is left alone ---
    with exit_on_user_error():
        index = prepare(recipe)

    # --- 3. What was made, and how to go on ---
    print(statistics(index))
    print(f"token shards and their tokenizer: {index.directory}")
    print(f"train on them: python scripts/pretrain.py --data.path {index.directory}")


if __name__ == "__main__":
    main(sys.argv[1:])
