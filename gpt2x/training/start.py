"""From a recipe to a job: everything that is made once, before step 1."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.batches.validation import ValidationBatches
from gpt2x.checkpoints.final_model import damage_of_final
from gpt2x.checkpoints.format import TrainerState, newest_checkpoint, read_state
from gpt2x.checkpoints.optimizer_state import load_optimizer_tensors, parameter_names
from gpt2x.checkpoints.progress import Progress
from gpt2x.checkpoints.retention import Retention, is_of_this_decay, note_validation
from gpt2x.checkpoints.saver import CheckpointSaver
from gpt2x.config import FinetuneRecipe, TrainingRecipe
from gpt2x.distributed.devices import describe_changes, environment_of, prepare
from gpt2x.distributed.flags import wait_for_everyone, wait_for_main
from gpt2x.distributed.tensor_parallel import cut_weights
from gpt2x.errors import UserError
from gpt2x.runs.directory import RunDirectory
from gpt2x.runs.layout import MODEL
from gpt2x.runs.records import clear, recorded_validation, refuse_to_start_over, reopen, sweep, truncate_records
from gpt2x.training.budget import Budget, make_budget
from gpt2x.training.cpu_attention import register_chunked_causal
from gpt2x.training.data import open_run_data, prepare_data, steps_per_epoch
from gpt2x.training.hellaswag import open_hellaswag
from gpt2x.training.job import Job
from gpt2x.training.optimizers import make_optimizers
from gpt2x.training.trainee import Trainee, WholeModel


def make_job(recipe: TrainingRecipe, run: RunDirectory, accelerator: Accelerator) -> tuple[Job, Progress]:
    """Everything a run works with, and where it stands: at the start, or at its newest checkpoint.

    Raises:
        UserError: for whatever can be known to go wrong before step 1.
    """
    prepare_data(recipe, accelerator)
    budget = make_budget(recipe.train, recipe.optimizer, steps_per_epoch=steps_per_epoch(recipe))
    checkpoint, lines = _checkpoint_to_resume(run, budget.size)
    tensors, trainer = ({}, TrainerState(step=0)) if checkpoint is None else read_state(checkpoint)
    for line in (*lines, *describe_changes(trainer.get("environment"), environment_of(accelerator))):
        accelerator.print(line)
    data = open_run_data(recipe, accelerator, saved=trainer.get("data"), step=trainer["step"])
    trainee = trainee_of(recipe)
    model = trainee.make(data.tokenizer)
    _check_ids(data.vocab_size, model)
    hellaswag = open_hellaswag(recipe, model, data.tokenizer, accelerator)
    if checkpoint is not None:
        trainee.load(model, checkpoint / MODEL)
    wait_for_everyone(accelerator)  # one may have read its data or its model for long
    prepared, optimizers = _prepared(model, recipe, accelerator)
    names = parameter_names(accelerator.unwrap_model(prepared))  # FSDP2 has put other parameters in their places
    progress = Progress()
    if checkpoint is not None:
        _check_optimizer(checkpoint, trainer["optimizer"], recipe.optimizer.name)
        if tensors:  # before the first update an optimizer has no state
            load_optimizer_tensors(optimizers, names, tensors)
        if accelerator.scaler is not None and trainer.get("scaler"):
            accelerator.scaler.load_state_dict(trainer["scaler"])
        progress = _progress(trainer, budget)
    if accelerator.is_main_process:
        _settle_records(run, checkpoint, progress, is_spent=budget.is_spent(progress))
    wait_for_main(accelerator)
    if (loss := recorded_validation(run, step=progress.step)) is not None:
        note_validation(progress, loss)
    job = Job(
        recipe=recipe,
        run=run,
        accelerator=accelerator,
        trainee=trainee,
        model=prepared,
        optimizers=optimizers,
        parameter_names=names,
        tokenizer=data.tokenizer,
        batches=data.batches,
        validation_batches=data.validation_batches,
        prompts=_prompts(recipe, data.tokenizer, data.validation_batches),
        budget=budget,
        hellaswag=hellaswag,
        saver=CheckpointSaver(
            run,
            lambda directory, weights: trainee.save(model, directory, data.tokenizer, weights=weights),
            retention=Retention.of(recipe.train),
            last_step=None if checkpoint is None else progress.step,
        ),
    )
    return job, progress


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


def _checkpoint_to_resume(run: RunDirectory, budget_size: float) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint that the run can go on from, and what there is to say of newer ones.

    Of a learning rate that decays towards another budget, that is the last one before the decay.

    Raises:
        UserError: where there is none, and a start from nothing would lose what the run holds.
    """
    checkpoint, lines = newest_checkpoint(
        run.path, is_wanted=lambda trainer: is_of_this_decay(trainer.get("decays_to"), budget_size)
    )
    newest, _ = newest_checkpoint(run.path) if checkpoint is None else (checkpoint, [])
    if newest is None:
        refuse_to_start_over(run, damaged=lines, damage_of_final=damage_of_final(run.final_dir))
    elif newest is not checkpoint:
        lines.append(f"{newest} has begun to decay to another budget, and none from before is left; going on from it.")
    return newest, lines


def _progress(trainer: Mapping[str, Any], budget: Budget) -> Progress:
    """Where a checkpoint stands; what older versions did not save has its default."""
    names = {field.name for field in dataclasses.fields(Progress)} & set(trainer)
    progress = Progress(**{name: trainer[name] for name in names})
    if not is_of_this_decay(progress.decays_to, budget.size):
        progress.decays_to = None
    return progress


def trainee_of(recipe: TrainingRecipe) -> Trainee:
    """What a recipe trains: adapters where it asks for them."""
    if isinstance(recipe, FinetuneRecipe) and recipe.lora is not None:
        from gpt2x.training.adapted import Adapters

        return Adapters(recipe)
    return WholeModel(recipe)


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles the repeated layers in place, all by the code of the first; names and checkpoints do not change."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.compile(dynamic=False)


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


def _prompts(
    recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase, validation_batches: ValidationBatches
) -> tuple[str, ...]:
    beginnings = validation_batches.document_beginnings(recipe.evaluation.num_validation_prompts, 32)
    return (*recipe.evaluation.prompts, *(tokenizer.decode(ids) for ids in beginnings))
