"""Continues text, or chats: `python scripts/generate.py MODEL [--prompt TEXT] [--chat] [--FIELD VALUE ...]`.

MODEL is a directory or Hub id of any causal language model, or the directory of a run. Without a prompt it asks for
one after another until end of input. With `--chat` these are the turns of one conversation; Ctrl-C ends an
answer early.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace

from gpt2x.command_line import parse_recipe
from gpt2x.config import GenerationRecipe
from gpt2x.errors import UserError
from gpt2x.prerequisites import check_chat_template, check_model
from gpt2x.terminal import command


def main(recipe: GenerationRecipe) -> None:
    """Streams the continuation of each prompt, or the answer to it, to stdout."""
    recipe = replace(recipe, prompt=as_text(recipe.prompt), system=as_text(recipe.system))
    if recipe.chat and recipe.prompt is not None and not recipe.prompt.strip():
        raise UserError("prompt is blank; give a text, or leave it out to be asked.")

    directory = check_model(recipe.model)
    if recipe.chat:
        check_chat_template(directory, name=recipe.model)
    import torch  # seconds, which a mistake need not wait for
    from transformers.utils import logging

    from gpt2x.chat import chat
    from gpt2x.distributed.devices import compute_device
    from gpt2x.evaluation.samples import stream_text
    from gpt2x.models import load_for_inference
    from gpt2x.tokenizers.bpe import load_tokenizer

    # 1. The model
    logging.disable_progress_bar()
    model = load_for_inference(directory, dtype=getattr(torch, recipe.dtype), device=compute_device(os.environ))
    tokenizer = load_tokenizer(directory)

    # 2. The texts
    torch.manual_seed(recipe.seed)
    if recipe.chat:
        chat(model, tokenizer, prompts(recipe), options=recipe)
        return
    for prompt in prompts(recipe):
        print(prompt, end="", flush=True)
        stream_text(model, tokenizer, prompt, recipe)


def as_text(argument: str | None) -> str | None:
    """An argument of bytes that the locale does not know, read as UTF-8."""
    return None if argument is None else argument.encode(errors="surrogateescape").decode(errors="replace")


def prompts(recipe: GenerationRecipe) -> Iterator[str]:
    """The recipe's prompt, or what the user types line by line; an escaped newline is one."""
    if recipe.prompt is not None:
        yield recipe.prompt
        return
    while True:
        try:
            yield input(">>> ").replace("\\n", "\n")
        except (EOFError, KeyboardInterrupt):
            print()
            return


if __name__ == "__main__":
    with command(is_product=True):
        parsed, _ = parse_recipe(GenerationRecipe, sys.argv[1:], script="generate.py", positional="model")
        main(parsed)
