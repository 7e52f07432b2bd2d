"""What stands against a preparation or an import, told before transformers and torch are imported."""

import glob
import os
from pathlib import Path

from gpt2x.config import CorpusSection, ImportRecipe, PreparationRecipe, TokenizerSection
from gpt2x.config.parts import shipped_or
from gpt2x.corpus.source_files import BUILDERS, matching_files
from gpt2x.errors import UserError
from gpt2x.locate import check_tokenizer, holds_tokenizer, local_path, place_to_write
from gpt2x.shards.index import INDEX_FILE
from gpt2x.shards.token_sets import open_tokens


def check_preparation(recipe: PreparationRecipe, *, section: str = "") -> None:
    """Looks for the files of a recipe; of shards that are finished they may be gone.

    Args:
        recipe: what is to be prepared.
        section: that it stands in, with a dot, for messages.

    Raises:
        UserError: where one is not there, and for places where nothing can be written.
    """
    check_directory(recipe.output_dir, field=f"{section}output_dir")
    if (recipe.output_dir / INDEX_FILE).is_file():
        return
    check_corpus(recipe.corpus)
    check_tokenizer_section(recipe.tokenizer, section=section)
    template = None if recipe.chat is None else recipe.chat.template
    if template is not None and not shipped_or(template).is_file():
        raise UserError(
            f"{section}chat.template ({template}) is no file; correct the path, or take tokenization/chatml.jinja."
        )


def check_task(task: int, recipe: PreparationRecipe) -> None:
    """Raises UserError for the number of a part that a preparation has not."""
    if not 0 <= task < recipe.num_tasks:
        raise UserError(f"task ({task}) must be at least 0 and below num_tasks ({recipe.num_tasks}); correct it.")


def check_corpus(corpus: CorpusSection) -> None:
    """Raises UserError where a path or pattern of this machine matches nothing."""
    if corpus.kind == "files":
        matching_files(corpus.paths)
    for file in corpus.data_files if corpus.dataset in BUILDERS else ():
        if "://" not in file and not os.path.lexists(file) and not glob.glob(file, recursive=True):
            raise UserError(f"corpus.data_files: {file!r} matches no file; correct the path, or quote the pattern.")


def check_tokenizer_section(tokenizer: TokenizerSection, *, section: str = "") -> None:
    """Raises UserError where the tokenizer is not there, and where one that is to be trained cannot be saved."""
    field = f"{section}tokenizer.path"
    if tokenizer.vocab_size is None:
        check_tokenizer(tokenizer.path, field=field)
    elif not holds_tokenizer(local_path(tokenizer.path)):
        check_directory(place_to_write(tokenizer.path, field=field), field=field)


def check_import(recipe: ImportRecipe) -> None:
    """Raises UserError where token files or their tokenizer are not there."""
    check_directory(recipe.output_dir, field="output_dir")
    check_tokenizer(recipe.tokenizer, field="tokenizer")
    is_ours = (Path(recipe.path) / INDEX_FILE).is_file()
    open_tokens(recipe.path, validation_path=recipe.validation_path, tokenizer=None if is_ours else recipe.tokenizer)


def check_directory(place: Path, *, field: str) -> None:
    """Raises UserError where a file is in the way of a directory that is to be made."""
    for path in (place, *place.parents):
        if path.is_dir():
            return
        if os.path.lexists(path):
            raise UserError(f"{field} ({place}) must be a directory, but {path} is a file; give another.")
