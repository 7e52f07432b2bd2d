"""Trains a byte-level BPE tokenizer on the training documents of a corpus.

python scripts/train_tokenizer.py --tokenizer tokenization/python-bpe.yaml
"""

import sys
from collections.abc import Sequence

from gpt2x.command_line import parse_recipe
from gpt2x.commands import shell_command
from gpt2x.config import TokenizerRecipe
from gpt2x.locate import holds_tokenizer, local_path
from gpt2x.preparation.checks import check_corpus, check_tokenizer_section
from gpt2x.terminal import command

# That of configuration/data/python-stdlib.yaml, whose held-out documents no tokenizer of the quickstart may see.
DEFAULT_CORPUS = ("--corpus.kind=python_stdlib", "--corpus.validation_fraction=0.06")


def corpus_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments that say which corpus it is."""
    words = list(argv)
    alone = [following.startswith("--") for following in [*words[1:], "--"]]  # a flag without a value
    pairs = [words[place : place + (1 if "=" in word or alone[place] else 2)] for place, word in enumerate(words)]
    return [word for pair in pairs if pair[0].startswith(("--corpus", "--config")) for word in pair]


def main(argv: Sequence[str]) -> None:
    """Trains the tokenizer that a command line describes."""
    # 1. The recipe. What imports transformers waits until it is known to be right, and its files to be there
    arguments = argv if corpus_arguments(argv) else [*argv, *DEFAULT_CORPUS]
    recipe, _ = parse_recipe(TokenizerRecipe, arguments, script="train_tokenizer.py")
    check_tokenizer_section(recipe.tokenizer)
    if recipe.tokenizer.vocab_size is not None and not holds_tokenizer(local_path(recipe.tokenizer.path)):
        check_corpus(recipe.corpus)
    from gpt2x.preparation.prepare import prepare_tokenizer
    from gpt2x.tokenizers.bpe import check_trained_on, vocabulary_size

    # 2. The tokenizer; a saved one of this size and corpus is left alone
    tokenizer = prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    check_trained_on(recipe.tokenizer, recipe.corpus)

    # 3. What was made, and how to go on
    print(f"tokenizer of {vocabulary_size(tokenizer):,} ids: {recipe.tokenizer.path}")
    same = [*corpus_arguments(argv), "--tokenizer.path", recipe.tokenizer.path, "--tokenizer.vocab_size", "null"]
    print(f"make token shards with it: {shell_command('prepare_data', *same, '--output_dir', 'DIRECTORY')}")


if __name__ == "__main__":
    with command(if_stopped="stopped; nothing is saved"):
        main(sys.argv[1:])
