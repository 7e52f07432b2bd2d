"""What a directory of token shards holds, in words: counts, and of conversations what a run will learn."""

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from gpt2x.shards.files import Shard, count_learned, learned_flags
from gpt2x.shards.index import SPLITS, Index
from gpt2x.shards.token_sets import TokenSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREVIEW_TOKENS = 600
BEGINNING, END = "⟦", "⟧"


def statistics(index: Index) -> str:
    """A line per split, and one for what was left out; reads where the documents end, and no tokens."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(index.dropped.items())) or "nothing"
    return "\n".join([*(_line(index, split) for split in SPLITS), f"left out: {dropped}"])


def longest_document(index: Index) -> int:
    """Tokens of the longest document of any split."""
    return max(_longest(index.open_split(split)) for split in SPLITS if index.has_split(split))


def _longest(shards: list[Shard]) -> int:
    return max(int(np.diff(shard.documents).max()) for shard in shards)


def _line(index: Index, split: str) -> str:
    if not index.has_split(split):
        return f"{split}: nothing"
    num_documents, num_bytes = index.total(split, "num_documents"), index.num_bytes(split)
    shards, tokens = index.open_split(split), index.total(split, "num_tokens")
    longest, of_tokens = _longest(shards), f"{tokens:,} tokens in {len(shards)} shards"
    if index.recipe.get("chat") is not None:  # the bytes are those that are learned, the tokens are all
        return (
            f"{split}: {num_documents:,} conversations, {of_tokens}, {num_bytes:,} bytes to learn, the longest "
            f"conversation {longest:,} tokens"
        )
    return (
        f"{split}: {num_documents:,} documents, {num_bytes:,} bytes, {of_tokens}, {num_bytes / tokens:.3f} bytes per "
        f"token, the longest document {longest:,} tokens"
    )


def preview(tokens: TokenSet, tokenizer: "PreTrainedTokenizerFast") -> str:
    """The first training document with brackets around what is learned of it, and how much that is of everything.

    Every target of the split is read, a byte per token.

    Raises:
        UserError: where there are no training tokens, or they are not what they should be.
    """
    shards = tokens.open_split("train")
    num_tokens = sum(shard.tokens.size for shard in shards)
    num_documents = sum(shard.documents.size - 1 for shard in shards)
    num_learned = sum(sum(count_learned(shard, counts_first=False)) for shard in shards)
    return (
        f"the first training document; what is learned stands between {BEGINNING} and {END}:\n"
        f"{_first_document(shards[0], tokenizer)}\n"
        f"learned: {num_learned:,} of {num_tokens:,} tokens ({num_learned / num_tokens:.1%}), in {num_documents:,} "
        f"documents; the longest has {_longest(shards):,} tokens"
    )


def _first_document(shard: Shard, tokenizer: "PreTrainedTokenizerFast") -> str:
    size = int(shard.documents[1])
    ids, targets = (values[: min(size, PREVIEW_TOKENS)] for values in (shard.tokens, learned_flags(shard)))
    borders = [0, *(np.flatnonzero(np.diff(targets.astype(np.int8))) + 1).tolist(), ids.size]
    parts = []
    for start, end in pairwise(borders):
        text = tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # What comes from a data set must not steer the terminal.
        text = "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
        parts.append(f"{BEGINNING}{text}{END}" if targets[start] else text)
    rest = f" ... and {size - PREVIEW_TOKENS:,} tokens more" if size > PREVIEW_TOKENS else ""
    return "".join(parts).rstrip("\n") + rest
