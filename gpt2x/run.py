"""A training run from its recipe to its final model: what scripts/pretrain.py and scripts/finetune.py do."""

from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from gpt2x.commands import shell_command
from gpt2x.config import FinetuneRecipe, TrainingRecipe
from gpt2x.training.signals import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gpt2x.checkpoints.progress import Progress
    from gpt2x.evaluation.validation import Validation
    from gpt2x.runs.directory import RunDirectory
    from gpt2x.training.job import Job


def run(recipe: TrainingRecipe, name: str, *, stop: StopRequest, environment: Mapping[str, str]) -> int:
    """Runs a recipe, or goes on with its unfinished run.

    Args:
        recipe: what to run.
        name: the run's name where the recipe gives none.
        stop: the signals received by this process.
        environment: of this process, as the launcher left it.

    Returns:
        The exit code: 0, or 128 + signal number where a signal ended the run early.

    Raises:
        UserError: for whatever the user can set right.
    """
    # 1. What torch is not needed for is checked before it is imported, so that complaints come at once
    from gpt2x.distributed.launch import check_launch, check_launch_of_adapters, num_data_ranks, passed_over
    from gpt2x.runs.directory import locked, open_run_directory
    from gpt2x.training.checks import check_before_torch

    is_main = environment.get("RANK", "0") == "0"
    check_launch(environment)
    if isinstance(recipe, FinetuneRecipe) and recipe.lora is not None:
        check_launch_of_adapters(environment)
    directory = open_run_directory(recipe, name=name)
    say = print if is_main else lambda _line: None
    for line in (*passed_over(environment, recipe), *directory.notes):
        say(line)
    if _is_finished(directory, say):
        return 0
    if is_main:
        run_dir = recipe.run.dir / (recipe.run.name or name)
        check_before_torch(recipe, num_processes=num_data_ranks(environment), run_dir=run_dir)

    # 2. From here on nobody else writes where the run stands
    with locked(directory.path) if is_main else nullcontext() as hold:
        # 3. Devices, data, model; training; the model, the numbers and the plots
        accelerator = _accelerator(recipe, environment)
        return _train(recipe, replace(directory, hold=hold), accelerator, stop)


def _is_finished(directory: "RunDirectory", say: Callable[[str], None]) -> bool:
    """Whether a run has ended and its model is whole, which is said; so it is where it is not whole."""
    from gpt2x.checkpoints.final_model import damage_of_final
    from gpt2x.runs.layout import named_checkpoints

    if not directory.is_finished():
        return False
    path, final = directory.path, directory.final_dir
    damage = damage_of_final(final)
    if damage is None:
        say(f"{path} is finished; its model is in {final}. Start another with --run.name NAME.")
    elif named_checkpoints(path):
        say(f"{final} is damaged ({damage}); it is made again from the last checkpoint.")
    return damage is None


def _accelerator(recipe: TrainingRecipe, environment: Mapping[str, str]) -> "Accelerator":
    from gpt2x.distributed.devices import make_accelerator
    from gpt2x.distributed.flags import after_main

    rank, num_processes = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    with after_main(rank=rank, num_processes=num_processes):
        return make_accelerator(recipe, environment)


def _train(recipe: TrainingRecipe, directory: "RunDirectory", accelerator: "Accelerator", stop: StopRequest) -> int:
    """Trains in a run's directory, which this process has to itself."""
    from gpt2x.preflight import describe, previews
    from gpt2x.runs.directory import write_config
    from gpt2x.training.finish import finish, push
    from gpt2x.training.loop import train
    from gpt2x.training.recording import Recorder
    from gpt2x.training.start import make_job

    job, progress = make_job(recipe, directory, accelerator)
    if accelerator.is_main_process and progress.step == 0:
        for text in previews(job):
            print(text)
    accelerator.print(describe(job, progress))
    if accelerator.is_main_process:
        write_config(directory, recipe)
    recorder = Recorder(job)
    with closing(job.batches), closing(recorder):
        validation = train(job, progress, recorder, stop)
    if validation is not None:
        finish(job, progress, validation)
        push(job)
    failures, last_lines = job.failures, _last_lines(job, progress, validation)
    # A model that outlives the talk between the processes ends it with Python's lock held, and may wait for ever.
    del job
    accelerator.free_memory()
    recorder.end()
    for line in (*failures.summary(), *last_lines):
        accelerator.print(line)
    return stop.exit_code if validation is None else 0


def _last_lines(job: "Job", progress: "Progress", validation: "Validation | None") -> list[str]:
    """What has become of a run, and what to do with it."""
    if validation is None:
        return [f"stopped at step {progress.step}; the same command goes on from there."]
    return [
        f"model:          {job.run.final_dir}",
        f"bits per byte:  {validation.bits_per_byte:.4f} on the held-out documents",
        _what_next(job),
    ]


def _what_next(job: "Job") -> str:
    if isinstance(job.recipe, FinetuneRecipe) and job.tokenizer.chat_template is not None:
        return f"chat with it:   {shell_command('generate', job.run.final_dir, '--chat')}"
    return f"sample from it: {shell_command('generate', job.run.final_dir)}"
