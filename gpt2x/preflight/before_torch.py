"""What is asked before torch is imported, which takes seconds: the launch, the recipe, its model and its data."""

from collections.abc import Mapping
from pathlib import Path

from gpt2x.batches.source import ShardSource, open_files
from gpt2x.config import DataSection, FinetuneRecipe, PreparationRecipe, TrainingRecipe, accumulation_steps
from gpt2x.distributed.launch import check_launch, check_launch_of_adapters
from gpt2x.errors import UserError
from gpt2x.evaluation.hellaswag_items import load_run_items
from gpt2x.locate import check_tokenizer, find_model
from gpt2x.preparation.checks import check_corpus, check_preparation
from gpt2x.prerequisites import (
    check_adaptable,
    check_installed,
    check_trackers,
    model_type_of,
    refuse_adapters,
)
from gpt2x.publishing.hub import check_push
from gpt2x.runs.layout import RunLayout, named_checkpoints


def check_process(recipe: TrainingRecipe, environment: Mapping[str, str]) -> None:
    """Checks how a process was launched; every one is asked.

    Raises:
        UserError: for a launch that would not do what was meant, or that adapters cannot be trained by.
    """
    check_launch(environment)
    if _has_adapters(recipe):
        check_launch_of_adapters(environment)


def check_recipe(recipe: TrainingRecipe, *, num_processes: int, run_dir: Path) -> dict[str, ShardSource]:
    """Checks what a recipe names, and prepares token shards where they are missing and the recipe can.

    Args:
        recipe: what is to be run.
        num_processes: data-parallel processes of the run, of which one should call this.
        run_dir: of the run. One that has begun goes on with the shards that it began with, whose content its
            checkpoint has the sha256 of.

    Returns:
        The sources that are no streams, by their keys.

    Raises:
        UserError: for a batch that cannot be cut evenly; for a model to start from that is not there or not whole; for
            shards that are missing, broken, too few, or of ids outside their vocabulary; for those of another
            preparation, or of texts that have changed since.
    """
    _check_batch(recipe, num_processes=num_processes)
    check_trackers(recipe.run.report_to)
    if recipe.hub.push:
        check_push(str(recipe.hub.repo_id))
    _check_origin(recipe)
    if recipe.evaluation.hellaswag is not None:
        load_run_items(recipe.evaluation)
    has_begun = bool(named_checkpoints(run_dir)) or RunLayout(run_dir).stats_file.exists()
    return check_data(recipe.data, seed=recipe.run.seed, has_begun=has_begun)


def check_data(data: DataSection, *, seed: int, has_begun: bool) -> dict[str, ShardSource]:
    """Prepares what is missing, and opens what is no stream: see check_recipe.

    Args:
        data: what to open.
        seed: of the order of the draws.
        has_begun: whether the run goes on, whatever its texts have become since.
    """
    for section in data.mixture:  # made before any is opened
        if section.preparation is not None and Path(section.location) == section.preparation.output_dir:
            check_preparation(section.preparation, section="data.preparation.")
            _prepare_or_compare(section.preparation, has_begun=has_begun)
    files = {}
    for section in data.mixture:
        if section.stream is not None:
            check_corpus(section.stream.corpus)
            check_tokenizer(section.stream.tokenizer, field="data.stream.tokenizer")
        else:
            files[section.key] = open_files(section, data, seed=seed)
    return files


def _check_origin(recipe: TrainingRecipe) -> None:
    """Looks at the model that a run starts from."""
    if recipe.init_from is None:
        return
    origin = find_model(recipe.init_from)
    refuse_adapters(origin)
    if _has_adapters(recipe):
        if Path(origin).is_dir():
            check_adaptable(origin, model_type_of(Path(origin)))
        check_installed("peft", what="lora")


def _has_adapters(recipe: TrainingRecipe) -> bool:
    return isinstance(recipe, FinetuneRecipe) and recipe.lora is not None


def _prepare_or_compare(preparation: PreparationRecipe, *, has_begun: bool) -> None:
    from gpt2x.corpus.sources import OtherDataError
    from gpt2x.preparation.prepare import prepare  # imports transformers

    try:
        prepare(preparation, is_quiet=has_begun)  # it was said when the run began
    except OtherDataError as error:
        if not has_begun:
            raise UserError(
                f"{error.difference}; set another data.preparation.output_dir, delete that directory, or train on "
                f"what it holds by --data.preparation null --data.path {preparation.output_dir}."
            ) from None
        print(f"{error.difference}; the run goes on with the shards that it began with.", flush=True)


def _check_batch(recipe: TrainingRecipe, *, num_processes: int) -> None:
    """Raises UserError where tokens_per_step is no multiple of what one pass over all processes reads."""
    try:
        accumulation_steps(
            recipe.train.tokens_per_step,
            micro_batch_size=recipe.train.micro_batch_size,
            sequence_length=recipe.data.sequence_length,
            num_processes=num_processes,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
