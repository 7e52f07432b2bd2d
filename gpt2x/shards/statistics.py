"""What a directory of token shards holds, in words."""

import numpy as np

from gpt2x.shards.index import SPLITS, Index


def statistics(index: Index) -> str:
    """A line per split, and one for what was left out; reads where the documents end, and no tokens."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(index.dropped.items())) or "nothing"
    return "\n".join([*(_line(index, split) for split in SPLITS), f"left out: {dropped}"])


def longest_document(index: Index) -> int:
    """Tokens of the longest document of any split."""
    shards = [shard for split in SPLITS if index.has_split(split) for shard in index.open_split(split)]
    return max(int(np.diff(shard.documents).max()) for shard in shards)


def _line(index: Index, split: str) -> str:
    if not index.has_split(split):
        return f"{split}: nothing"
    num_documents, tokens, num_bytes = (
        index.total(split, name) for name in ("num_documents", "num_tokens", "num_bytes")
    )
    shards = index.open_split(split)
    longest = max(int(np.diff(shard.documents).max()) for shard in shards)
    of_tokens = f"{tokens:,} tokens in {len(shards)} shards"
    if index.recipe.get("chat") is not None:  # the bytes are those that are learned, the tokens are all
        return (
            f"{split}: {num_documents:,} conversations, {of_tokens}, {num_bytes:,} bytes to learn, the longest "
            f"conversation {longest:,} tokens"
        )
    return (
        f"{split}: {num_documents:,} documents, {num_bytes:,} bytes, {of_tokens}, {num_bytes / tokens:.3f} bytes per "
        f"token, the longest document {longest:,} tokens"
    )
