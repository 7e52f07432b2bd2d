"""Pretrains a model: `accelerate launch scripts/pretrain.py [--config RECIPE.yaml] [--FIELD VALUE ...]`.

Without arguments it runs configuration/pretrain/quickstart.yaml: five minutes on a laptop's processor, no network.
The same command again goes on with an unfinished run.
"""

import os
import sys
from pathlib import Path

from gpt2x.config import Recipe
from gpt2x.terminal import command, one_voice
from gpt2x.training.signals import StopRequest

QUICKSTART = Path(__file__).parent.parent / "configuration" / "pretrain" / "quickstart.yaml"
# Set by torchrun, and by accelerate launch for a single process.
HAS_LAUNCHER = "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


if __name__ == "__main__":
    with command(os.environ), StopRequest(watches_parent=HAS_LAUNCHER) as signals:
        from gpt2x.command_line import parse_recipe

        # 1. The recipe and its overrides
        with one_voice(os.environ):
            recipe, config_file = parse_recipe(Recipe, sys.argv[1:], script="pretrain.py", default_config=QUICKSTART)
        name = config_file.stem if config_file else "pretrain"

        # 2. The run, from its data to its final model
        from gpt2x.run import run

        sys.exit(run(recipe, name, stop=signals, environment=os.environ))
