"""What scripts/import_tokens.py runs; imports neither torch nor transformers."""

from dataclasses import dataclass
from pathlib import Path

from gpt2x.config.checks import Count, Seed, ShareBelowOne, check_numbers


@dataclass(frozen=True, kw_only=True)
class ImportRecipe:
    """Token files of another project to token shards."""

    path: str
    """Token files: a directory, a file or a pattern; or a directory of token shards, to cut it anew."""
    tokenizer: str
    """Directory or Hub id of the tokenizer that made the ids; saved beside the shards."""
    output_dir: Path
    """Directory of the token shards and their index."""
    validation_path: str | None = None
    """Held-out token files, where path does not hold them under a name with `val`."""
    tokens_per_shard: Count = 100_000_000
    """Tokens per shard file at most, about 200 MB; documents stay whole."""
    validation_fraction: ShareBelowOne = 0.005
    """Share of the documents, chosen by the hash of their ids, that is held out where the input holds out none."""
    split_seed: Seed = 0
    """Another seed holds out other documents."""

    def __post_init__(self) -> None:
        check_numbers(self, "")
