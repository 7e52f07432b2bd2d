"""Runs lm-eval's tasks: `python scripts/run_lm_eval.py MODEL --tasks hellaswag,piqa [--FIELD VALUE ...]`.

MODEL is a directory or Hub id of any causal language model, or the directory of a run, whose stats.json then gets the
results. Needs the extra `eval`. lm-eval's own command reads any checkpoint as well:
`lm_eval --model hf --model_args pretrained=RUN/final --tasks hellaswag`.
"""

import os
import sys

from gpt2x.command_line import parse_recipe
from gpt2x.config.evaluation import LmEvalRecipe
from gpt2x.errors import UserError
from gpt2x.prerequisites import check_installed, check_model
from gpt2x.terminal import command


def main(recipe: LmEvalRecipe) -> None:
    """Prints every figure of every task and records them with the run."""
    check_installed("eval", what="run_lm_eval.py")
    directory = check_model(recipe.model)
    if recipe.include_path is not None and not recipe.include_path.is_dir():
        raise UserError(f"include_path ({recipe.include_path}) must be a directory with tasks; correct it.")
    from transformers.utils import logging  # seconds, which a mistake need not wait for

    from gpt2x.distributed.devices import compute_device
    from gpt2x.evaluation.lm_eval import run_lm_eval
    from gpt2x.runs.results import record_results

    logging.disable_progress_bar()
    results = run_lm_eval(recipe, compute_device(os.environ))
    stats_file = record_results(directory, {f"lm_eval/{task}": found for task, found in results.items()})
    for task, figures in results.items():
        for name, figure in figures.items():
            print(
                f"{task:30s} {name:24s} {figure:.4f}"
                if isinstance(figure, float)
                else f"{task:30s} {name:24s} {figure}"
            )
    if stats_file is not None:
        print(f"recorded in {stats_file}")


if __name__ == "__main__":
    with command():
        parsed, _ = parse_recipe(LmEvalRecipe, sys.argv[1:], script="run_lm_eval.py", positional="model")
        main(parsed)
