"""Trains a byte-level BPE tokenizer on the training documents of a corpus.

python scripts/train_tokenizer.py --tokenizer tokenization/python-bpe.yaml
"""

import shlex
import sys
from collections.abc import Sequence

from gpt2x.command_line import parse_recipe
from gpt2x.config import TokenizerRecipe
from gpt2x.errors import exit_on_user_error
from gpt2x.terminal import command

# That of configuration/data/python-stdlib.yaml, whose held-out documents no tokenizer of the quickstart may see.
DEFAULT_CORPUS = ("--corpus.kind=python_stdlib", "--corpus.validation_fraction=0.06")


def corpus_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments that say which corpus it is."""
    words = list(argv)
    pairs = [words[place : place + (1 if "=" in word else 2)] for place, word in enumerate(words)]
    return [word for pair in pairs if pair[0].startswith(("--corpus", "--config")) for word in pair]


def main(argv: Sequence[str]) -> None:
    """Trains the tokenizer that a command line describes."""
    # --- 1. The recipe. What imports transformers waits until it is known to be right ---
    arguments = argv if corpus_arguments(argv) else [*argv, *DEFAULT_CORPUS]
    recipe, _ = parse_recipe(TokenizerRecipe, arguments, script="train_tokenizer.py")
    from gpt2x.shards.preparation import prepare_tokenizer
    from gpt2x.shards.tokenizer import check_trained_on, vocabulary_size

    # --- 2. The tokenizer; a saved one of this size and corpus is left alone ---
    with exit_on_user_error():
        tokenizer = prepare_tokenizer(recipe.tokenizer, recipe.corpus)
        check_trained_on(recipe.tokenizer, recipe.corpus)

    # --- 3. What was made, and how to go on ---
    print(f"tokenizer of {vocabulary_size(tokenizer):,} ids: {recipe.tokenizer.path}")
    path = shlex.quote(recipe.tokenizer.path)
    same_corpus = "".join(f"{shlex.quote(word)} " for word in corpus_arguments(argv))
    print(
        f"make token shards with it: python scripts/prepare_data.py {same_corpus}--tokenizer.path {path} "
        f"--tokenizer.vocab_size null --output_dir DIRECTORY"
    )


if __name__ == "__main__":
    with command(if_stopped="stopped; nothing is saved"):
        main(sys.argv[1:])
