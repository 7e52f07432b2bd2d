"""What is wrong with a recipe or its data, told before torch is imported, which takes seconds."""

from pathlib import Path

from gpt2x.batches.source import tokens_of
from gpt2x.batches.whole_documents import open_file_source
from gpt2x.config import TrainingRecipe, accumulation_steps
from gpt2x.errors import UserError
from gpt2x.locate import find_model
from gpt2x.shards.index import INDEX_FILE


def check_before_torch(recipe: TrainingRecipe, *, num_processes: int) -> None:
    """Checks the batch and the token shards, which are prepared first where they are missing and the recipe can.

    Args:
        recipe: what is to be run.
        num_processes: data-parallel processes of the run, of which one should call this.

    Raises:
        UserError: for a batch that cannot be cut evenly; for a model to start from that is not there or not whole; for
            shards that are missing, broken, too few, or of ids outside their vocabulary.
    """
    check_batch(recipe, num_processes=num_processes)
    if recipe.init_from is not None:
        find_model(recipe.init_from)
    _check_hellaswag(recipe.evaluation.hellaswag)
    prepare_missing_shards(recipe)
    for section in recipe.data.mixture:
        if section.stream is None:
            open_file_source(tokens_of(section), recipe.data, seed=recipe.run.seed, name=section.key)


def _check_hellaswag(source: str | None) -> None:
    if source not in (None, "hub") and not Path(str(source)).is_file():
        raise UserError(
            f"evaluation.hellaswag ({source}) does not exist; give HellaSwag's validation split as a .jsonl file, or "
            f"hub."
        )


def prepare_missing_shards(recipe: TrainingRecipe) -> None:
    """Makes the token shards that are missing where a source's preparation writes them to its place."""
    for section in recipe.data.mixture:
        preparation, location = section.preparation, Path(section.location)
        if preparation is None or location != preparation.output_dir or (location / INDEX_FILE).exists():
            continue
        from gpt2x.shards.preparation import prepare  # imports transformers

        prepare(preparation)


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
