"""Prepares a corpus: trains its tokenizer where the recipe asks for that, and writes token shards.

python scripts/prepare_data.py --config configuration/data/python-stdlib.yaml

Texts of one's own, and no recipe:
python scripts/prepare_data.py --corpus.kind files --corpus.paths '["texts"]' \\
  --tokenizer.path data/mine/tokenizer --tokenizer.vocab_size 8192 --output_dir data/mine

Conversations of one's own, whose columns are known by their names; shows one, and what of it is learned:
python scripts/prepare_data.py --config configuration/data/smol-smoltalk-chat.yaml --corpus.kind files \\
  --corpus.dataset null --corpus.paths '["chats.jsonl"]' --corpus.validation_fraction 0.1 --output_dir data/chats

On a cluster every job of an array makes one part, and the same command without --task finishes:
python scripts/prepare_data.py --config RECIPE.yaml --num_tasks 100 --task $SLURM_ARRAY_TASK_ID
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpt2x.command_line import parse_recipe
from gpt2x.commands import shell_command
from gpt2x.config import PreparationRecipe
from gpt2x.config.checks import Range
from gpt2x.preparation.checks import check_preparation, check_task
from gpt2x.terminal import command

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configuration" / "data" / "python-stdlib.yaml"


@dataclass(frozen=True, kw_only=True)
class PreparationCommand(PreparationRecipe):
    """Text to token shards: what scripts/prepare_data.py runs."""

    task: Annotated[int, Range(least=0, below=10**5)] | None = None
    """Makes this part alone, of 0 to num_tasks - 1, as a job of a cluster array; null makes all that are missing and
    finishes."""


def names_a_corpus(argv: Sequence[str]) -> bool:
    """Whether the corpus is the user's own; then tokenizer and output_dir must be as well."""
    return any(argument.startswith("--corpus") for argument in argv)


def main(argv: Sequence[str]) -> None:
    """Runs the preparation that a command line describes."""
    # --- 1. The recipe. What imports transformers waits until it is known to be right, and its files to be there ---
    default = None if names_a_corpus(argv) else DEFAULT_CONFIG
    asked, _ = parse_recipe(PreparationCommand, argv, script="prepare_data.py", default_config=default)
    fields = dict(vars(asked))
    task = fields.pop("task")
    recipe = PreparationRecipe(**fields)
    check_preparation(recipe)
    if task is not None:
        check_task(task, recipe)
    from gpt2x.preparation.prepare import prepare, prepare_task
    from gpt2x.shards.statistics import longest_document, preview, statistics
    from gpt2x.tokenizers.bpe import load_tokenizer

    # --- 2. Text to token shards; what is finished is left alone ---
    if task is not None:
        prepare_task(recipe, task)
        print(f"task {task} of {recipe.num_tasks} is finished; without --task this command finishes the rest")
        return
    index = prepare(recipe)
    found = statistics(index)
    shown = preview(index, load_tokenizer(index.tokenizer_dir)) if recipe.chat is not None else None
    longest = longest_document(index)

    # --- 3. What was made, and how to go on ---
    print(found)
    if shown is not None:
        print(shown)
    print(f"token shards and their tokenizer: {index.directory}")
    way_on = shell_command("pretrain", "--data.path", index.directory)
    if recipe.chat is not None:
        length = ["--data.sequence_length", str(recipe.chat.max_length or longest)]
        way_on = shell_command("finetune", "--init_from", "MODEL", "--data.path", index.directory, *length)
    print(f"train on them: {way_on}")


if __name__ == "__main__":
    with command(if_stopped="stopped; the same command goes on with the tasks that are not finished"):
        main(sys.argv[1:])
