"""What a directory of token shards holds, in words."""

import numpy as np

from gpt2x.shards.index import SPLITS, Index


def statistics(index: Index) -> str:
    """A line per split, and one for what was left out; reads where the documents end, and no tokens."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(index.dropped.items())) or "nothing"
    return "\n".join([*(_line(index, split) for split in SPLITS), f"left out: {dropped}"])


def _line(index: Index, split: str) -> str:
    if not index.has_split(split):
        return f"{split}: nothing"
    num_documents, tokens, num_bytes = (
        index.total(split, name) for name in ("num_documents", "num_tokens", "num_bytes")
    )
    longest = max(int(np.diff(shard.documents).max()) for shard in index.open_split(split))
    return (
        f"{split}: {num_documents:,} documents, {num_bytes:,} bytes, {tokens:,} tokens in "
        f"{len(index.splits[split])} shards, {num_bytes / tokens:.3f} bytes per token, the longest document "
        f"{longest:,} tokens"
    )
