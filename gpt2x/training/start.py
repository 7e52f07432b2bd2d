"""From a recipe to a job: everything that is made once, before step 1."""

import dataclasses
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.batches.validation import ValidationBatches
from gpt2x.config import Recipe
from gpt2x.errors import UserError
from gpt2x.models import load_weights, make_model
from gpt2x.training.budget import make_budget
from gpt2x.training.checkpoints import load_optimizer_tensors, newest_checkpoint, parameter_names, read_state
from gpt2x.training.cpu_attention import register_chunked_causal
from gpt2x.training.data import open_run_data
from gpt2x.training.job import Job
from gpt2x.training.optimizers import make_optimizers
from gpt2x.training.run_directory import RunDirectory, clear, truncate_records
from gpt2x.training.state import Progress


def make_job(recipe: Recipe, run: RunDirectory, accelerator: Accelerator) -> tuple[Job, Progress]:
    """Everything a run works with, and where it stands: at the start, or at its newest checkpoint.

    Raises:
        UserError: for whatever can be known to go wrong before step 1.
    """
    checkpoint, passed_over = newest_checkpoint(run.path)
    for line in passed_over:
        accelerator.print(line)
    tensors, trainer = ({}, {}) if checkpoint is None else read_state(checkpoint)
    data = open_run_data(recipe, accelerator, saved=trainer.get("data"), step=trainer.get("step", 0))
    model = make_model(recipe, data.tokenizer)
    _check_ids(data.vocab_size, model)
    if checkpoint is not None:
        load_weights(model, checkpoint / "model")
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if accelerator.device.type == "cpu":
        model.set_attn_implementation(register_chunked_causal())
    optimizers = make_optimizers(model, recipe.optimizer)
    names = parameter_names(model)
    if recipe.train.torch_compile:
        compile_layers(model)
    prepared, *optimizers = accelerator.prepare(model, *optimizers)
    progress, budget = Progress(), make_budget(recipe.train, recipe.optimizer)
    if checkpoint is not None:
        _check_optimizer(checkpoint, trainer["optimizer"], recipe.optimizer.name)
        load_optimizer_tensors(optimizers, names, tensors)
        progress = Progress(**{field.name: trainer[field.name] for field in dataclasses.fields(Progress)})
    if accelerator.is_main_process:
        _settle_records(run, checkpoint, progress, is_spent=budget.is_spent(progress))
    accelerator.wait_for_everyone()
    job = Job(
        recipe=recipe,
        run=run,
        accelerator=accelerator,
        model=prepared,
        optimizers=optimizers,
        parameter_names=names,
        tokenizer=data.tokenizer,
        batches=data.batches,
        validation_batches=data.validation_batches,
        prompts=_prompts(recipe, data.tokenizer, data.validation_batches),
        budget=budget,
    )
    return job, progress


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
            f"back, or start a new run with --run.name NAME and --init_from {checkpoint}/model."
        )


def _settle_records(run: RunDirectory, checkpoint: Path | None, progress: Progress, *, is_spent: bool) -> None:
    """Nothing recorded may be later than the weights, or what is about to be made again."""
    if checkpoint is None:
        clear(run)
    else:
        truncate_records(run, step=progress.step, is_followed_up=progress.is_followed_up and not is_spent)


def _prompts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, validation_batches: ValidationBatches
) -> tuple[str, ...]:
    beginnings = validation_batches.document_beginnings(recipe.evaluation.num_validation_prompts, 32)
    return (*recipe.evaluation.prompts, *(tokenizer.decode(ids) for ids in beginnings))
