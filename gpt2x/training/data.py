"""The data of a run: opened at its start, or where its checkpoint stands."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from gpt2x.batches.loader import TrainingBatches, check_unchanged
from gpt2x.batches.mixture import Mixture, open_mixture
from gpt2x.batches.order import GlobalOrder, Phase, phases_of_json
from gpt2x.batches.read_ahead import ReadAhead
from gpt2x.batches.validation import ValidationBatches
from gpt2x.config import TrainingRecipe
from gpt2x.distributed.ranks import data_rank, wait_for_main
from gpt2x.errors import UserError
from gpt2x.tokenizers.bpe import load_tokenizer, tokenizer_fingerprint
from gpt2x.training.checks import check_batch, prepare_missing_shards


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run reads.

    Attributes:
        batches: this rank's share of any step.
        validation_batches: this rank's share of the held-out documents.
        tokenizer: the one that made the ids.
        vocab_size: every id is below it.
    """

    batches: ReadAhead
    validation_batches: ValidationBatches
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int


def prepare_data(recipe: TrainingRecipe, accelerator: Accelerator) -> None:
    """Checks the batch, and makes the token shards that are missing.

    Raises:
        UserError: for a batch that cannot be cut evenly, and for whatever is wrong with the corpus.
    """
    check_batch(recipe, num_processes=data_rank(accelerator).num_ranks)
    if accelerator.is_main_process:
        prepare_missing_shards(recipe)
    wait_for_main(accelerator)


def steps_per_epoch(recipe: TrainingRecipe) -> float | None:
    """Optimizer steps in which as many sequences are read as the sources have; None where the budget needs none."""
    if recipe.train.num_train_epochs is None:
        return None
    sources = open_mixture(recipe.data, seed=recipe.run.seed).sources
    num_windows = sum(source.num_windows or 0 for source in sources)  # streams have a budget of another kind
    return num_windows * recipe.data.sequence_length / recipe.train.tokens_per_step


def open_run_data(
    recipe: TrainingRecipe, accelerator: Accelerator, *, saved: Mapping[str, Any] | None, step: int
) -> RunData:
    """Opens the sources, the held-out documents and the tokenizer.

    Args:
        recipe: what to open.
        accelerator: of the run.
        saved: what the checkpoint holds of the data; None at the start.
        step: the next step.

    Raises:
        UserError: where data or tokenizer are missing, changed, do not belong together, or are not enough.
    """
    states = {name: source["state"] for name, source in saved["sources"].items()} if saved else {}
    mixture = open_mixture(
        recipe.data, seed=recipe.run.seed, states=states, fills_streams=accelerator.is_local_main_process
    )
    order = _order(recipe, mixture, accelerator, saved=saved, step=step)
    tokenizer = _tokenizer(mixture)
    batches = TrainingBatches(
        order,
        mixture.sources,
        micro_batch_size=recipe.train.micro_batch_size,
        rank=data_rank(accelerator).rank,
        num_processes=data_rank(accelerator).num_ranks,
        mask_documents_at=tokenizer.eos_token_id if recipe.data.packing == "documents" else None,
    )
    read_ahead = ReadAhead(
        batches,
        num_workers=recipe.data.num_workers,
        prefetch_steps=recipe.data.prefetch_steps,
        pin_memory=accelerator.device.type == "cuda",
    )
    validation_batches = ValidationBatches(
        mixture.held_out,
        sequence_length=recipe.data.sequence_length,
        batch_size=recipe.evaluation.batch_size,
        rank=data_rank(accelerator).rank,
        num_processes=data_rank(accelerator).num_ranks,
        packing=recipe.data.packing,
    )
    return RunData(
        batches=read_ahead,
        validation_batches=validation_batches,
        tokenizer=tokenizer,
        vocab_size=mixture.vocab_size,
    )


def _order(
    recipe: TrainingRecipe, mixture: Mixture, accelerator: Accelerator, *, saved: Mapping[str, Any] | None, step: int
) -> GlobalOrder:
    """The order of the whole run; where the recipe's mixture or batch size is another now, with a new phase."""
    length = recipe.data.sequence_length
    phase = Phase(
        sequences_per_step=recipe.train.tokens_per_step // length,
        weights=mixture.weights,
        block_size=recipe.data.block_size,
    )
    skipped = recipe.data.skipped_batches
    if saved is None:
        return GlobalOrder(recipe.run.seed, [phase], skipped)
    check_unchanged(saved, mixture.sources, seed=recipe.run.seed, sequence_length=length)
    before = GlobalOrder(recipe.run.seed, phases_of_json(saved["phases"]), [tuple(pair) for pair in saved["skipped"]])
    order = before.with_skipped(skipped, step=step).with_phase(replace(phase, first_batch=before.batch_of(step)))
    if len(order.phases) > len(before.phases):
        accelerator.print(
            f"data: from step {step} on a new mixture, {_shares(order.phases[-1])} in batches of "
            f"{phase.sequences_per_step} sequences; every source goes on where it stands."
        )
    return order


def _shares(phase: Phase) -> str:
    counts = zip(phase.weights, phase.counts_per_block, strict=True)
    return ", ".join(f"{name} {count / phase.block_size:.1%}" for name, count in counts)


def _tokenizer(mixture: Mixture) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(mixture.tokenizer_dir)
    if mixture.tokenizer_fingerprint not in (None, tokenizer_fingerprint(tokenizer)):
        raise UserError(
            f"the tokenizer at {mixture.tokenizer_dir} is not the one that made the token shards; prepare the shards "
            f"again or restore the tokenizer."
        )
    return tokenizer
