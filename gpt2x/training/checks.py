"""What is wrong with a recipe or its data, told before torch is imported, which takes seconds."""

from pathlib import Path

from gpt2x.batches.source import tokens_of
from gpt2x.batches.whole_documents import open_file_source
from gpt2x.config import FinetuneRecipe, PreparationRecipe, TrainingRecipe, accumulation_steps
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
from gpt2x.shards.index import INDEX_FILE


def check_before_torch(recipe: TrainingRecipe, *, num_processes: int, run_dir: Path) -> None:
    """Checks the batch and the token shards, which are prepared first where they are missing and the recipe can.

    Args:
        recipe: what is to be run.
        num_processes: data-parallel processes of the run, of which one should call this.
        run_dir: of the run. One that has begun goes on with the shards that it began with, whose content its
            checkpoint has the sha256 of.

    Raises:
        UserError: for a batch that cannot be cut evenly; for a model to start from that is not there or not whole; for
            shards that are missing, broken, too few, or of ids outside their vocabulary; for those of another
            preparation, or of texts that have changed since.
    """
    check_batch(recipe, num_processes=num_processes)
    check_trackers(recipe.run.report_to)
    if recipe.hub.push:
        check_push(str(recipe.hub.repo_id))
    _check_origin(recipe)
    if recipe.evaluation.hellaswag is not None:
        load_run_items(recipe.evaluation)
    has_begun = bool(named_checkpoints(run_dir)) or RunLayout(run_dir).stats_file.exists()
    for preparation in _preparations(recipe):
        check_preparation(preparation, section="data.preparation.")
        _prepare_or_compare(preparation, has_begun=has_begun)
    for section in recipe.data.mixture:
        if section.stream is not None:
            check_corpus(section.stream.corpus)
            check_tokenizer(section.stream.tokenizer, field="data.stream.tokenizer")
        else:
            open_file_source(tokens_of(section), recipe.data, seed=recipe.run.seed, name=section.key)


def _check_origin(recipe: TrainingRecipe) -> None:
    """Looks at the model that a run starts from."""
    if recipe.init_from is None:
        return
    origin = find_model(recipe.init_from)
    refuse_adapters(origin)
    if isinstance(recipe, FinetuneRecipe) and recipe.lora is not None:
        if Path(origin).is_dir():
            check_adaptable(origin, model_type_of(Path(origin)))
        check_installed("peft", what="lora")


def prepare_missing_shards(recipe: TrainingRecipe) -> None:
    """Makes the token shards that are missing where a source's preparation writes them to its place."""
    for preparation in _preparations(recipe):
        if not (preparation.output_dir / INDEX_FILE).exists():
            from gpt2x.preparation.prepare import prepare  # imports transformers

            prepare(preparation)


def _preparations(recipe: TrainingRecipe) -> list[PreparationRecipe]:
    """Those of the sources that are read where they are prepared."""
    sections = [section for section in recipe.data.mixture if section.preparation is not None]
    places = [(Path(section.location), section.preparation) for section in sections]
    return [preparation for place, preparation in places if preparation and place == preparation.output_dir]


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


def check_batch(recipe: TrainingRecipe, *, num_processes: int) -> None:
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
