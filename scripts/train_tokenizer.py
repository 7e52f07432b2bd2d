"""Trains a byte-level BPE tokenizer on the training documents of a corpus.

python scripts/train_tokenizer.py --tokenizer tokenization/python-bpe.yaml
"""

import json
import shlex
import sys
from collections.abc import Sequence

from gpt2x.command_line import parse_recipe
from gpt2x.config import CorpusSection, TokenizerRecipe
from gpt2x.errors import exit_on_user_error


def main(argv: Sequence[str]) -> None:
    """Trains the tokenizer that a command line describes."""
    # --- 1. The recipe. What imports transformers waits until it is known to be right ---
    recipe, _ = parse_recipe(TokenizerRecipe, argv, script="train_tokenizer.py")
    from gpt2x.shards.preparation import prepare_tokenizer
    from gpt2x.shards.tokenizer import vocabulary_size

    # --- 2. The tokenizer; a saved one of this size is left alone ---
    with exit_on_user_error():
        tokenizer = prepare_tokenizer(recipe.tokenizer, recipe.corpus)

    # --- 3. What was made, and how to go on ---
    print(f"tokenizer of {vocabulary_size(tokenizer):,} ids: {recipe.tokenizer.path}")
    print(
        f"make token shards with it: python scripts/prepare_data.py {_corpus_flags(recipe.corpus)} "
        f"--tokenizer.path {shlex.quote(recipe.tokenizer.path)} --tokenizer.vocab_size null --output_dir DIRECTORY"
    )


def _corpus_flags(corpus: CorpusSection) -> str:
    """The corpus as it is written on a command line: its kind, and what is not as by default."""
    default, flags = CorpusSection(), []
    for name, value in vars(corpus).items():
        if name == "document_separator" and value is not None:
            value = value.encode("unicode_escape").decode()
        if name == "kind" or value != getattr(default, name):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flags.append(f"--corpus.{name}={shlex.quote(text)}")
    return " ".join(flags)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("stopped; nothing is saved", file=sys.stderr)
        sys.exit(130)
