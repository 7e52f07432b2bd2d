"""Pretrains a model: `accelerate launch scripts/pretrain.py [--config RECIPE.yaml] [--FIELD VALUE ...]`.

Without arguments it runs configuration/pretrain/quickstart.yaml: five minutes on a laptop's processor, no network.
The same command again goes on with an unfinished run.
"""

import os
import sys
from contextlib import closing
from pathlib import Path

from gpt2x.command_line import parse_recipe
from gpt2x.config import Recipe
from gpt2x.errors import exit_on_user_error
from gpt2x.training.checks import check_before_torch

QUICKSTART = Path(__file__).parent.parent / "configuration" / "pretrain" / "quickstart.yaml"


def main(recipe: Recipe, name: str) -> int:
    """Runs a recipe; returns the exit code, 128 + signal number where a signal ended the run early."""
    # 1. What torch is not needed for is checked before it is imported, so that complaints come at once
    if os.environ.get("RANK", "0") == "0":
        check_before_torch(recipe, num_processes=int(os.environ.get("WORLD_SIZE", "1")))
    from gpt2x.preflight import describe
    from gpt2x.training.devices import make_accelerator
    from gpt2x.training.finish import finish
    from gpt2x.training.loop import train
    from gpt2x.training.recording import Recorder
    from gpt2x.training.run_directory import open_run_directory, write_config
    from gpt2x.training.signals import StopRequest
    from gpt2x.training.start import make_job

    # 2. Where the run stands
    run = open_run_directory(recipe, name=name)
    if run.is_finished(recipe):
        print(f"{run.path} is finished; its model is in {run.final_dir}. Start another with --run.name NAME.")
        return 0

    # 3. Devices, data, model
    accelerator = make_accelerator(recipe, local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    job, progress = make_job(recipe, run, accelerator)
    if accelerator.is_main_process:
        write_config(run, recipe)
    accelerator.print(describe(job, progress))

    # 4. Train
    recorder = Recorder(job)
    with StopRequest() as stop, closing(job.batches):
        validation = train(job, progress, recorder, stop)
    recorder.close()
    if validation is None:
        accelerator.print(f"stopped at step {progress.step}; the same command goes on from there.")
        accelerator.end_training()
        return stop.exit_code

    # 5. Leave the model, the numbers and the plots
    finish(job, progress, validation)
    accelerator.print(
        f"model:          {run.final_dir}\n"
        f"bits per byte:  {validation.bits_per_byte:.4f} on the held-out documents\n"
        f"sample from it: python scripts/generate.py {run.final_dir}"
    )
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    parsed, config_file = parse_recipe(Recipe, sys.argv[1:], script="pretrain.py", default_config=QUICKSTART)
    with exit_on_user_error():
        sys.exit(main(parsed, name=config_file.stem if config_file else "pretrain"))
