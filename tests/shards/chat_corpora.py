"""Conversations, the recipes that prepare them, and what has come of them."""

import dataclasses
import hashlib
import json
from itertools import pairwise
from pathlib import Path

from gpt2x.config import ChatSection, PreparationRecipe

ROOT = Path(__file__).parents[2]
CHATML = ROOT / "tokenization" / "chatml.jinja"
TOKENS = ["<|im_start|>", "<|im_end|>"]
SECTION = ChatSection(template=CHATML, special_tokens=TOKENS, end_of_turn="<|im_end|>")
WORDS = ["alpha", "beta", "gamma", "naïve", "中文", "what?", "Yes."]
NUM_CHATS = 40


def conversation(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_chat(recipe: PreparationRecipe, **fields) -> PreparationRecipe:
    assert recipe.chat is not None
    return dataclasses.replace(recipe, chat=dataclasses.replace(recipe.chat, **fields))


def documents(index, split: str) -> list[tuple[list[int], list[int]]]:
    """The ids and the targets of a split's documents."""
    return [
        (shard.tokens[start:end].tolist(), shard.targets[start:end].tolist())
        for shard in index.open_split(split)
        for start, end in pairwise(shard.documents)
    ]


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def single(recipe: PreparationRecipe, *texts: str, copies: int = 3) -> PreparationRecipe:
    """A corpus of one conversation, several times."""
    write_rows(Path(recipe.corpus.paths[0]), [{"messages": conversation(*texts)}] * copies)
    return dataclasses.replace(recipe, corpus=dataclasses.replace(recipe.corpus, validation_fraction=0))
