"""From a recipe to its trainer: everything that is made once, before step 1."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from gpt2x.checkpoints.format import TrainerState, damage_of_final, newest_checkpoint, read_state
from gpt2x.checkpoints.progress import Progress
from gpt2x.checkpoints.retention import is_of_this_decay, note_validation
from gpt2x.checkpoints.saver import CheckpointSaver
from gpt2x.checkpoints.state import load_optimizer_tensors, parameter_names
from gpt2x.config import TrainingRecipe
from gpt2x.distributed.devices import describe_changes, environment_of, prepare
from gpt2x.distributed.ranks import wait_for_everyone, wait_for_main
from gpt2x.distributed.tensor_parallel import cut_weights
from gpt2x.errors import UserError
from gpt2x.models import flops_per_token
from gpt2x.runs.directory import RunDirectory
from gpt2x.runs.layout import MODEL
from gpt2x.runs.records import clear, recorded_validation, refuse_to_start_over, reopen, sweep, truncate_records
from gpt2x.training.cpu_attention import register_chunked_causal
from gpt2x.training.data import open_run_data, prepare_data, steps_per_epoch
from gpt2x.training.evaluators import make_evaluators
from gpt2x.training.optimizers import make_optimizers
from gpt2x.training.recording import Recorder
from gpt2x.training.schedules import Budget, make_budget
from gpt2x.training.signals import StopRequest
from gpt2x.training.trainee import trainee_of
from gpt2x.training.trainer import Trainer


def make_trainer(recipe: TrainingRecipe, run: RunDirectory, *, accelerator: Accelerator, stop: StopRequest) -> Trainer:
    """Everything a run works with, which stands at the start, or at its newest checkpoint.

    Raises:
        UserError: for whatever can be known to go wrong before step 1.
    """
    # 1. The budget, and the checkpoint that tells where the run stands
    prepare_data(recipe, accelerator)
    budget = make_budget(recipe.train, recipe.optimizer, steps_per_epoch=steps_per_epoch(recipe))
    checkpoint, lines = _checkpoint_to_resume(run, budget.size)
    tensors, saved = ({}, TrainerState(step=0)) if checkpoint is None else read_state(checkpoint)
    for line in (*lines, *describe_changes(saved.get("environment"), environment_of(accelerator))):
        accelerator.print(line)

    # 2. Data and model
    data = open_run_data(recipe, accelerator, saved=saved.get("data"), step=saved["step"])
    trainee = trainee_of(recipe)
    model = trainee.make(data.tokenizer)
    _check_ids(data.vocab_size, model)
    if checkpoint is not None:
        trainee.load(model, checkpoint / MODEL)
    wait_for_everyone(accelerator)  # one may have read its data or its model for long
    prepared, optimizers = _prepared(model, recipe, accelerator)
    plain_model = accelerator.unwrap_model(prepared)
    names = parameter_names(plain_model)  # FSDP2 has put other parameters in their places
    if checkpoint is not None:
        _check_optimizer(checkpoint, saved["optimizer"], recipe.optimizer.name)
    if tensors:  # before the first update an optimizer has no state
        load_optimizer_tensors(optimizers, names, tensors)
    if accelerator.scaler is not None and saved.get("scaler"):
        accelerator.scaler.load_state_dict(saved["scaler"])

    # 3. What is recorded and measured
    progress = _progress(saved, budget)
    recorder = Recorder(
        recipe,
        run,
        accelerator=accelerator,
        budget=budget,
        progress=progress,
        flops_per_token=flops_per_token(plain_model, recipe.data.sequence_length),
    )
    evaluators = make_evaluators(recipe, plain_model, data=data, accelerator=accelerator, recorder=recorder)
    if accelerator.is_main_process:
        _settle_records(run, checkpoint, progress, is_spent=budget.is_spent(progress))
    wait_for_main(accelerator)
    if (loss := recorded_validation(run, step=progress.step)) is not None:
        note_validation(progress, loss)

    return Trainer(
        recipe=recipe,
        run=run,
        accelerator=accelerator,
        stop=stop,
        trainee=trainee,
        model=prepared,
        optimizers=optimizers,
        parameter_names=names,
        tokenizer=data.tokenizer,
        batches=data.batches,
        validation_batches=data.validation_batches,
        budget=budget,
        progress=progress,
        recorder=recorder,
        evaluators=evaluators,
        saver=CheckpointSaver(
            run,
            lambda directory, weights: trainee.save(model, directory, data.tokenizer, weights=weights),
            rules=recipe.train,
            last_step=None if checkpoint is None else progress.step,
        ),
    )


def _prepared(
    model: PreTrainedModel, recipe: TrainingRecipe, accelerator: Accelerator
) -> tuple[nn.Module, list[Optimizer]]:
    """The model as the recipe and the devices want it, and its optimizers."""
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if accelerator.device.type == "cpu":
        model.set_attn_implementation(register_chunked_causal())
    cut_weights(model, accelerator)
    optimizers = make_optimizers(model, recipe.optimizer, mixed_precision=recipe.train.mixed_precision)
    if recipe.train.torch_compile:
        compile_layers(model)
    return prepare(accelerator, model, optimizers)


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles the repeated layers in place, all by the code of the first; names and checkpoints do not change."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.compile(dynamic=False)


def _checkpoint_to_resume(run: RunDirectory, budget_size: float) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint that the run can go on from, and what there is to say of newer ones.

    Of a learning rate that decays towards another budget, that is the last one before the decay.

    Raises:
        UserError: where there is none, and a start from nothing would lose what the run holds.
    """
    checkpoint, lines = newest_checkpoint(
        run.path, is_wanted=lambda saved: is_of_this_decay(saved.get("decays_to"), budget_size)
    )
    newest, _ = newest_checkpoint(run.path) if checkpoint is None else (checkpoint, [])
    if newest is None:
        refuse_to_start_over(run, damaged=lines, damage_of_final=damage_of_final(run.final_dir))
    elif newest is not checkpoint:
        lines.append(f"{newest} has begun to decay to another budget, and none from before is left; going on from it.")
    return newest, lines


def _progress(saved: Mapping[str, Any], budget: Budget) -> Progress:
    """Where a checkpoint stands; what older versions did not save has its default."""
    names = {field.name for field in dataclasses.fields(Progress)} & set(saved)
    progress = Progress(**{name: saved[name] for name in names})
    if not is_of_this_decay(progress.decays_to, budget.size):
        progress.decays_to = None
    return progress


def _check_ids(vocab_size: int, model: PreTrainedModel) -> None:
    if vocab_size > model.config.vocab_size:
        raise UserError(
            f"model.vocab_size ({model.config.vocab_size}) must be at least the shards' {vocab_size} token ids; "
            f"leave it out to take the tokenizer's size."
        )


def _check_optimizer(checkpoint: Path, saved: str, name: str) -> None:
    if saved != name:
        raise UserError(
            f"optimizer.name ({name}) must be that of {checkpoint}, {saved}, whose state is gone on with; set it "
            f"back, or start a new run with --run.name NAME and --init_from {checkpoint / MODEL}."
        )


def _settle_records(run: RunDirectory, checkpoint: Path | None, progress: Progress, *, is_spent: bool) -> None:
    """Nothing recorded may be later than the weights, or what is about to be made again."""
    sweep(run)
    if not is_spent:
        reopen(run)
    if checkpoint is None:
        clear(run)
    else:
        truncate_records(run, step=progress.step, is_followed_up=progress.is_followed_up and not is_spent)
