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

from gpt2x.command_line import parse_recipe
from gpt2x.config import PreparationRecipe
from gpt2x.errors import exit_on_user_error
from gpt2x.terminal import command

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configuration" / "data" / "python-stdlib.yaml"


@dataclass(frozen=True, kw_only=True)
class PreparationCommand(PreparationRecipe):
    """Text to token shards: what scripts/prepare_data.py runs."""

    task: int | None = None
    """Makes this part alone, of 0 to num_tasks - 1, as a job of a cluster array; null makes all that are missing and
    finishes."""


def names_a_corpus(argv: Sequence[str]) -> bool:
    """Whether the corpus is the user's own; then tokenizer and output_dir must be as well."""
    return any(argument.startswith("--corpus") for argument in argv)


def main(argv: Sequence[str]) -> None:
    """Runs the preparation that a command line describes."""
    # --- 1. The recipe. What imports transformers waits until it is known to be right ---
    default = None if names_a_corpus(argv) else DEFAULT_CONFIG
    command, _ = parse_recipe(PreparationCommand, argv, script="prepare_data.py", default_config=default)
    fields = dict(vars(command))
    task = fields.pop("task")
    recipe = PreparationRecipe(**fields)
    from gpt2x.shards.chat_preview import preview
    from gpt2x.shards.preparation import prepare, prepare_task
    from gpt2x.shards.statistics import longest_document, statistics
    from gpt2x.shards.tokenizer import load_tokenizer

    # --- 2. Text to token shards; what is finished is left alone ---
    with exit_on_user_error():
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
    script, length = "pretrain.py", ""
    if recipe.chat is not None:
        script = "finetune.py --init_from MODEL"
        length = f" --data.sequence_length {recipe.chat.max_length or longest}"
    print(f"train on them: python scripts/{script} --data.path {index.directory}{length}")


if __name__ == "__main__":
    with command(if_stopped="stopped; the same command goes on with the tasks that are not finished"):
        main(sys.argv[1:])
