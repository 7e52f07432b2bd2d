"""From a recipe to a job: everything that is made once, before step 1."""

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.batches.loader import TrainingBatches
from gpt2x.batches.order import GlobalOrder
from gpt2x.batches.source import ShardSource
from gpt2x.batches.validation import ValidationBatches
from gpt2x.config import Recipe
from gpt2x.errors import UserError
from gpt2x.models import load_weights, make_model
from gpt2x.shards.index import Index, load_index
from gpt2x.shards.tokenizer import load_tokenizer, tokenizer_fingerprint
from gpt2x.training.budget import make_budget
from gpt2x.training.checkpoints import load_optimizer_tensors, newest_checkpoint, parameter_names, read_state
from gpt2x.training.checks import check_batch, prepare_missing_shards
from gpt2x.training.cpu_attention import register_chunked_causal
from gpt2x.training.job import Job
from gpt2x.training.optimizers import make_optimizers
from gpt2x.training.run_directory import RunDirectory, clear, truncate_records
from gpt2x.training.state import Progress


def open_data(recipe: Recipe, accelerator: Accelerator) -> tuple[Index, PreTrainedTokenizerBase]:
    """The token shards and their tokenizer; the shards are prepared first where they are missing and the recipe can.

    Raises:
        UserError: where shards or tokenizer are missing or do not belong together.
    """
    shards_dir = recipe.data.shards_dir
    if accelerator.is_main_process:
        prepare_missing_shards(recipe)
    accelerator.wait_for_everyone()
    index = load_index(shards_dir)
    tokenizer = load_tokenizer(index.tokenizer_dir)
    if tokenizer_fingerprint(tokenizer) != index.tokenizer_fingerprint:
        raise UserError(
            f"the tokenizer at {index.tokenizer_dir} is not the one that made {shards_dir}; "
            f"prepare the shards again or restore the tokenizer."
        )
    return index, tokenizer


def make_job(recipe: Recipe, run: RunDirectory, accelerator: Accelerator) -> tuple[Job, Progress]:
    """Everything a run works with, and where it stands: at the start, or at its newest checkpoint.

    Raises:
        UserError: for whatever can be known to go wrong before step 1.
    """
    index, tokenizer = open_data(recipe, accelerator)
    batches, validation_batches = _make_batches(recipe, index, accelerator)
    model = make_model(recipe, tokenizer)
    _check_ids(index, model)
    checkpoint, passed_over = newest_checkpoint(run.path)
    for line in passed_over:
        accelerator.print(line)
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
        progress = _restore(checkpoint, index, recipe.optimizer.name, optimizers, names)
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
        tokenizer=tokenizer,
        batches=batches,
        validation_batches=validation_batches,
        prompts=_prompts(recipe, tokenizer, validation_batches),
        budget=budget,
        data_fingerprint=index.fingerprint,
    )
    return job, progress


def _make_batches(recipe: Recipe, index: Index, accelerator: Accelerator) -> tuple[TrainingBatches, ValidationBatches]:
    train, length = recipe.train, recipe.data.sequence_length
    check_batch(recipe, num_processes=accelerator.num_processes)
    source = ShardSource(index, split="train", sequence_length=length)
    batches = TrainingBatches(
        GlobalOrder.of([source], seed=recipe.run.seed),
        [source],
        sequences_per_step=train.tokens_per_step // length,
        micro_batch_size=train.micro_batch_size,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    validation_batches = ValidationBatches(
        index,
        sequence_length=length,
        batch_size=recipe.evaluation.batch_size,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    return batches, validation_batches


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles the repeated layers in place, all by the code of the first; names and checkpoints do not change."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.compile(dynamic=False)


def _check_ids(index: Index, model: PreTrainedModel) -> None:
    if index.vocab_size > model.config.vocab_size:
        raise UserError(
            f"model.vocab_size ({model.config.vocab_size}) must be at least the shards' {index.vocab_size} token ids; "
            f"leave it out to take the tokenizer's size."
        )


def _restore(
    checkpoint: Path, index: Index, optimizer_name: str, optimizers: list[Any], names: dict[int, str]
) -> Progress:
    tensors, trainer = read_state(checkpoint)
    if trainer["data_fingerprint"] != index.fingerprint:
        then, now = trainer["data_fingerprint"][:12], index.fingerprint[:12]
        raise UserError(
            f"the token shards have changed since {checkpoint} was made (fingerprint {then}, now {now}); "
            f"restore them, or start a new run with --run.name NAME."
        )
    if trainer["optimizer"] != optimizer_name:
        raise UserError(
            f"optimizer.name ({optimizer_name}) must be that of {checkpoint}, {trainer['optimizer']}, whose state is "
            f"gone on with; set it back, or start a new run with --run.name NAME and --init_from {checkpoint}/model."
        )
    load_optimizer_tensors(optimizers, names, tensors)
    return Progress(**{field.name: trainer[field.name] for field in dataclasses.fields(Progress)})


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
