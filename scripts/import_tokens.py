"""Rewrites token files of another project (nanoGPT, llm.c, numpy, datatrove, torch, Arrow, Parquet) as token shards.

python scripts/import_tokens.py --path ../nanoGPT/data/openwebtext --tokenizer gpt2 --output_dir shards
"""

import sys
from collections.abc import Sequence

from gpt2x.command_line import parse_recipe
from gpt2x.commands import shell_command
from gpt2x.config import ImportRecipe
from gpt2x.preparation.checks import check_import
from gpt2x.terminal import command


def main(argv: Sequence[str]) -> None:
    """Runs the import that a command line describes."""
    # 1. The recipe. What imports transformers waits until it is known to be right, and its files to be there
    recipe, _ = parse_recipe(ImportRecipe, argv, script="import_tokens.py")
    check_import(recipe)
    from gpt2x.preparation.importing import import_tokens
    from gpt2x.shards.statistics import statistics

    # 2. Token files to token shards; what is finished is left alone
    index = import_tokens(recipe)
    found = statistics(index)

    # 3. What was made, and how to go on
    print(found)
    print(f"token shards and their tokenizer: {index.directory}")
    print(f"train on them: {shell_command('pretrain', '--data.path', index.directory)}")


if __name__ == "__main__":
    with command(if_stopped="stopped; the same command begins again"):
        main(sys.argv[1:])
