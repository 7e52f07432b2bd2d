"""Runs of several recipes in one set of processes that share every model: one start of torch instead of many.

As a script it is what each of the processes runs: a directory, and the names of the recipes in it.
"""

import shutil
import sys
from contextlib import closing
from pathlib import Path

from ranks import leave


def cut_back(run_dir, *, num_steps=20):
    """Leaves a finished run as it was when it had made the checkpoint before its last."""
    shutil.rmtree(run_dir / "checkpoints" / f"step-{num_steps:06d}")
    (run_dir / "stats.json").unlink()


def run_recipes(directory, names):
    """Runs DIRECTORY/NAME.yaml of each name, one after the other."""
    from accelerate.state import AcceleratorState, GradientState

    from gpt2x.command_line import parse_recipe
    from gpt2x.config import Recipe

    for name in names:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        recipe, _ = parse_recipe(Recipe, ["--config", str(directory / f"{name}.yaml")], script="", default_config=None)
        run_recipe(recipe, name)


def run_recipe(recipe, name):
    """As scripts/pretrain.py does it, but the processes stay."""
    from gpt2x.distributed.devices import make_accelerator
    from gpt2x.distributed.sharding import is_sharded
    from gpt2x.runs.directory import open_run_directory, write_config
    from gpt2x.training import finish as at_the_end
    from gpt2x.training.loop import train
    from gpt2x.training.signals import StopRequest
    from gpt2x.training.start import make_trainer

    run = open_run_directory(recipe, name=name)
    accelerator = make_accelerator(recipe, {"ACCELERATE_USE_FSDP": "true", "LOCAL_WORLD_SIZE": "2"})
    job = make_trainer(recipe, run, accelerator=accelerator, stop=StopRequest())
    assert is_sharded(job.plain_model)
    assert accelerator.num_processes == 2
    if accelerator.is_main_process:
        write_config(run, recipe)
    with closing(job.batches), job.recorder:
        found = train(job)
    at_the_end.write_plots = lambda directory: None  # takes longer than the run
    at_the_end.finish(job, found)
    assert job.recorder.failures.summary() == []
    check_soundness(job)


def check_soundness(job):
    """All processes know it where one's shard holds a number that is none, or no loss is finite."""
    import torch

    from gpt2x.training.anomalies import find_unsound

    assert find_unsound(job) is None
    weights = [getattr(weight, "_local_tensor", weight) for weight in job.plain_model.parameters()]
    with torch.no_grad():
        kept = weights[0].clone()
        if not job.accelerator.is_main_process:
            weights[0].view(-1)[0] = torch.nan
        assert find_unsound(job).endswith("is not finite")
        weights[0].copy_(kept)
        for weight in weights:
            weight.fill_(1e15)
    assert find_unsound(job).startswith("the loss of a validation batch is ")


if __name__ == "__main__":
    run_recipes(Path(sys.argv[1]), sys.argv[2:])
    leave()
