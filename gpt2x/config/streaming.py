"""What a filler is told when it is started."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FillerRecipe:
    """What the filler is told, as JSON on its standard input. Lines that follow are Beginnings: the oldest needed
    era."""

    name: str
    """Of the source, for messages."""
    cache_dir: str
    corpus: Mapping[str, Any]
    vocabulary: Mapping[str, Any]
    tokens_per_shard: int
    shards_per_era: int
    max_cached_shards: int
    retry_s: float
    stall_s: float
    ledger: Mapping[str, Any]
    """What the reader knows already, from the oldest era on that it needs."""
