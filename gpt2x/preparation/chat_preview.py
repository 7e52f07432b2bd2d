"""What a run will learn of conversations, to be looked at before it starts: one of them, and the counts."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerFast

from gpt2x.shards.files import Shard
from gpt2x.shards.learned import count_learned, learned_flags

MAX_TOKENS = 600
BEGINNING, END = "⟦", "⟧"


def preview(shards: Sequence[Shard], tokenizer: PreTrainedTokenizerFast) -> str:
    """The first training document with brackets around what is learned of it, and how much that is of everything.

    Args:
        shards: of the training split, of which every target is read, a byte per token.
        tokenizer: that made them.
    """
    return (
        f"the first training document; what is learned stands between {BEGINNING} and {END}:\n"
        f"{_document(shards[0], tokenizer)}\n"
        f"{_counts(shards)}"
    )


def _document(shard: Shard, tokenizer: PreTrainedTokenizerFast) -> str:
    size = int(shard.documents[1])
    ids, targets = shard.tokens[: min(size, MAX_TOKENS)], learned_flags(shard)[: min(size, MAX_TOKENS)]
    borders = [0, *(np.flatnonzero(np.diff(targets.astype(np.int8))) + 1).tolist(), ids.size]
    parts = [_part(ids[start:end], bool(targets[start]), tokenizer) for start, end in pairwise(borders)]
    rest = f" ... and {size - MAX_TOKENS:,} tokens more" if size > MAX_TOKENS else ""
    return "".join(parts).rstrip("\n") + rest


def _part(ids: np.ndarray, is_learned: bool, tokenizer: PreTrainedTokenizerFast) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # What comes from a data set must not steer the terminal.
    text = "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
    return f"{BEGINNING}{text}{END}" if is_learned else text


def _counts(shards: Sequence[Shard]) -> str:
    num_tokens = sum(shard.tokens.size for shard in shards)
    num_documents = sum(shard.documents.size - 1 for shard in shards)
    num_learned = sum(sum(count_learned(shard, counts_first=False)) for shard in shards)
    longest = max(int(np.diff(shard.documents).max()) for shard in shards)
    return (
        f"learned: {num_learned:,} of {num_tokens:,} tokens ({num_learned / num_tokens:.1%}), in {num_documents:,} "
        f"documents; the longest has {longest:,} tokens"
    )
