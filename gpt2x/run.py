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

    from gpt2x.runs.directory import RunDirectory
    from gpt2x.training.evaluators import Metrics
    from gpt2x.training.trainer import Trainer


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
    from gpt2x.checkpoints.format import damage_of_final
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
    from gpt2x.distributed.ranks import after_main

    rank, num_processes = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    with after_main(rank=rank, num_processes=num_processes):
        return make_accelerator(recipe, environment)


def _train(recipe: TrainingRecipe, directory: "RunDirectory", accelerator: "Accelerator", stop: StopRequest) -> int:
    """Trains in a run's directory, which this process has to itself."""
    from gpt2x.preflight import describe, previews
    from gpt2x.runs.directory import write_config
    from gpt2x.training.finish import finish, push
    from gpt2x.training.loop import train
    from gpt2x.training.start import make_trainer

    trainer = make_trainer(recipe, directory, accelerator=accelerator, stop=stop)
    if accelerator.is_main_process and trainer.progress.step == 0:
        for text in previews(trainer):
            print(text)
    accelerator.print(describe(trainer))
    if accelerator.is_main_process:
        write_config(directory, recipe)
    with closing(trainer.batches), trainer.recorder as recorder:
        found = train(trainer)
    if found is not None:
        finish(trainer, found)
        push(trainer)
    last_lines = _last_lines(trainer, found)
    # A model that outlives the talk between the processes ends it with Python's lock held, and may wait for ever.
    del trainer
    accelerator.free_memory()
    recorder.end()
    for line in (*recorder.failures.summary(), *last_lines):
        accelerator.print(line)
    return stop.exit_code if found is None else 0


def _last_lines(trainer: "Trainer", found: "Metrics | None") -> list[str]:
    """What has become of a run, and what to do with it."""
    if found is None:
        return [f"stopped at step {trainer.progress.step}; the same command goes on from there."]
    final_dir = trainer.run.final_dir
    way_on = f"sample from it: {shell_command('generate', final_dir)}"
    if isinstance(trainer.recipe, FinetuneRecipe) and trainer.tokenizer.chat_template is not None:
        way_on = f"chat with it:   {shell_command('generate', final_dir, '--chat')}"
    return [
        f"model:          {final_dir}",
        f"bits per byte:  {found['val/bits_per_byte']:.4f} on the held-out documents",
        way_on,
    ]
