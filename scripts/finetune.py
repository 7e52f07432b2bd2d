"""Fine-tunes a model: `accelerate launch scripts/finetune.py [--config RECIPE.yaml] [--FIELD VALUE ...]`.

From a run of pretrain.py, or any stock GPT-2, Llama, Qwen3 or NanoChat model: all weights, or LoRA adapters. Without
arguments it runs configuration/finetune/chat.yaml on the model of pretrain.py's quickstart: two minutes, no network.
The same command again goes on with an unfinished run.
"""

import os
import sys
from pathlib import Path

from gpt2x.config import FinetuneRecipe
from gpt2x.terminal import command, one_voice
from gpt2x.training.signals import StopRequest

QUICKSTART = Path(__file__).parent.parent / "configuration" / "finetune" / "chat.yaml"
# Set by torchrun, and by accelerate launch for a single process.
HAS_LAUNCHER = "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


if __name__ == "__main__":
    with command(os.environ), StopRequest(watches_parent=HAS_LAUNCHER) as signals:
        from gpt2x.command_line import parse_recipe

        # 1. The recipe and its overrides
        with one_voice(os.environ):
            recipe, config_file = parse_recipe(
                FinetuneRecipe, sys.argv[1:], script="finetune.py", default_config=QUICKSTART
            )
        name = config_file.stem if config_file else "finetune"

        # 2. The run, from its data to its final model
        from gpt2x.run import run

        sys.exit(run(recipe, name, stop=signals, environment=os.environ))
