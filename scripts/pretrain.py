"""Pretrains a model: `accelerate launch scripts/pretrain.py [--config RECIPE.yaml] [--FIELD VALUE ...]`.

Without arguments it runs configuration/pretrain/quickstart.yaml: five minutes on a laptop's processor, no network.
The same command again goes on with an unfinished run.
"""

import os
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2x.config import Recipe
from gpt2x.errors import exit_on_user_error
from gpt2x.training.signals import StopRequest

if TYPE_CHECKING:
    from gpt2x.training.run_directory import RunDirectory

QUICKSTART = Path(__file__).parent.parent / "configuration" / "pretrain" / "quickstart.yaml"
IS_MAIN = os.environ.get("RANK", "0") == "0"
# Set by torchrun, and by accelerate launch for a single process.
HAS_LAUNCHER = "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def main(recipe: Recipe, name: str, stop: StopRequest) -> int:
    """Runs a recipe; returns the exit code, 128 + signal number where a signal ended the run early."""
    # 1. What torch is not needed for is checked before it is imported, so that complaints come at once
    from gpt2x.training.checks import check_before_torch
    from gpt2x.training.launch import check_launch

    check_launch(os.environ)
    if IS_MAIN:
        check_before_torch(recipe, num_processes=int(os.environ.get("WORLD_SIZE", "1")))

    # 2. Where the run stands; from here on nobody else writes to it
    from gpt2x.training.lock import locked
    from gpt2x.training.run_directory import open_run_directory

    run = open_run_directory(recipe, name=name)
    if run.is_finished(recipe):
        print(f"{run.path} is finished; its model is in {run.final_dir}. Start another with --run.name NAME.")
        return 0
    with locked(run.path, is_forced=recipe.run.force_lock) if IS_MAIN else nullcontext():
        return pretrain(recipe, run, stop)


def pretrain(recipe: Recipe, run: "RunDirectory", stop: StopRequest) -> int:
    """Trains in a run's directory, which this process has to itself."""
    from gpt2x.preflight import describe
    from gpt2x.training.devices import make_accelerator
    from gpt2x.training.finish import finish, push
    from gpt2x.training.launch import asks_for_sharding
    from gpt2x.training.loop import train
    from gpt2x.training.recording import Recorder
    from gpt2x.training.run_directory import write_config
    from gpt2x.training.start import make_job

    # 3. Devices, data, model
    accelerator = make_accelerator(
        recipe,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        is_sharded=asks_for_sharding(os.environ),
    )
    job, progress = make_job(recipe, run, accelerator)
    accelerator.print(describe(job, progress))
    if accelerator.is_main_process:
        write_config(run, recipe)

    # 4. Train
    recorder = Recorder(job)
    with closing(job.batches), closing(recorder):
        validation = train(job, progress, recorder, stop)
    stop.let_go()  # what follows can be repeated from the last checkpoint

    # 5. Leave the model, the numbers and the plots
    if validation is not None:
        finish(job, progress, validation)
        push(job)
    recorder.end()
    for failure in job.failures.summary():
        accelerator.print(failure)
    if validation is None:
        accelerator.print(f"stopped at step {progress.step}; the same command goes on from there.")
        return stop.exit_code
    accelerator.print(
        f"model:          {run.final_dir}\n"
        f"bits per byte:  {validation.bits_per_byte:.4f} on the held-out documents\n"
        f"sample from it: python scripts/generate.py {run.final_dir}"
    )
    return 0


if __name__ == "__main__":
    with StopRequest(watches_parent=HAS_LAUNCHER) as signals, exit_on_user_error():
        from gpt2x.command_line import parse_recipe

        parsed, config_file = parse_recipe(Recipe, sys.argv[1:], script="pretrain.py", default_config=QUICKSTART)
        sys.exit(main(parsed, config_file.stem if config_file else "pretrain", signals))
