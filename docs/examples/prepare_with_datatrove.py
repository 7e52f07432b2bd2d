"""Prepares a corpus with datatrove (`pip install datatrove`), on this machine or as a SLURM array.

python docs/examples/prepare_with_datatrove.py configuration/data/python-stdlib.yaml --num_tasks 4
python docs/examples/prepare_with_datatrove.py configuration/data/fineweb-edu.yaml --partition cpu

datatrove runs the tasks, repeats the ones that failed and keeps their logs; what a task does is gpt2x's own function,
so the shards are the same bytes as those of scripts/prepare_data.py.
"""

import argparse
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

from gpt2x.command_line import parse_recipe
from gpt2x.config import PreparationRecipe
from gpt2x.preparation.prepare import finalize, prepare_task, prepare_tokenizer


class PrepareTask:
    """A step of a pipeline: makes the part of the corpus that has the task's rank."""

    def __init__(self, recipe: PreparationRecipe) -> None:
        self.recipe = recipe

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        assert world_size == self.recipe.num_tasks, "a task of datatrove is a task of the preparation"
        prepare_task(self.recipe, rank)


class Finalize:
    """A step that runs once, when every part is there."""

    def __init__(self, recipe: PreparationRecipe) -> None:
        self.recipe = recipe

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        finalize(self.recipe)


def main() -> None:
    """Runs the recipe here, or hands it to SLURM where a partition is named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--partition", help="of the cluster; without it this machine does the work")
    parser.add_argument("--time", default="04:00:00")
    parser.add_argument("--workers", type=int, default=2)
    options, overrides = parser.parse_known_args()
    recipe, _ = parse_recipe(PreparationRecipe, ["--config", options.recipe, *overrides], script=parser.prog)
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    logs = str(recipe.output_dir) + "-logs"
    if options.partition is None:
        tasks = LocalPipelineExecutor(
            [PrepareTask(recipe)], tasks=recipe.num_tasks, workers=options.workers, logging_dir=f"{logs}/tasks"
        )
        LocalPipelineExecutor([Finalize(recipe)], depends=tasks, logging_dir=f"{logs}/finalize").run()
        return
    cluster = {"partition": options.partition, "time": options.time, "cpus_per_task": 4, "mem_per_cpu_gb": 2}
    tasks = SlurmPipelineExecutor(
        [PrepareTask(recipe)],
        tasks=recipe.num_tasks,
        workers=options.workers,
        job_name="prepare",
        logging_dir=f"{logs}/tasks",
        **cluster,
    )
    SlurmPipelineExecutor(
        [Finalize(recipe)], tasks=1, depends=tasks, job_name="finalize", logging_dir=f"{logs}/finalize", **cluster
    ).run()


if __name__ == "__main__":
    main()
