"""Where tokens come from: corpora, preparation, the sources of a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt2x.config.checks import check_positive


@dataclass(frozen=True, kw_only=True)
class CorpusSection:
    """Where documents come from, and how they are split."""

    kind: Literal["python_stdlib", "files"] = "python_stdlib"
    """The sources of this interpreter's standard library without its tests, or files of one's own."""
    paths: list[str] = field(default_factory=list)
    """For kind files: files or glob patterns; a .txt is one document, a .jsonl one per line."""
    text_column: str = "text"
    """The field of a .jsonl line that holds the text."""
    validation_fraction: float = 0.05
    """Share of the documents, chosen by the hash of their text, that is held out."""
    split_seed: int = 0
    """Another seed holds out other documents."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction ({self.validation_fraction}) must be at least 0 and below 1; 0.05 is usual."
            )
        if (self.kind == "files") != bool(self.paths):
            raise ValueError(
                f"corpus.paths ({self.paths}) belongs to kind: files, and is needed there; kind is {self.kind}."
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """Which tokenizer reads the corpus; trained on its training documents where vocab_size is given."""

    path: str
    """Directory (or Hub id) of a transformers tokenizer; a trained one is saved there."""
    vocab_size: int | None = None
    """Size of the byte-level BPE to train, special tokens included; null to use the tokenizer at path as it is."""
    eos_token: str = "<|endoftext|>"
    """The token that ends every document, of a tokenizer trained here."""

    def __post_init__(self) -> None:
        if self.vocab_size is not None and self.vocab_size < 257:
            raise ValueError(
                f"tokenizer.vocab_size ({self.vocab_size}) must be at least 257: 256 bytes and the end of text."
            )


@dataclass(frozen=True, kw_only=True)
class PreparationRecipe:
    """Text to token shards: what scripts/prepare_data.py runs."""

    output_dir: Path
    """Directory of the token shards and their index."""
    corpus: CorpusSection = field(default_factory=CorpusSection)
    tokenizer: TokenizerSection
    tokens_per_shard: int = 100_000_000
    """Tokens per shard file at most, about 200 MB; documents stay whole."""

    def __post_init__(self) -> None:
        check_positive("", tokens_per_shard=self.tokens_per_shard)


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """What scripts/train_tokenizer.py runs."""

    corpus: CorpusSection = field(default_factory=CorpusSection)
    tokenizer: TokenizerSection


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The token shards to train on."""

    path: Path | None = None
    """Directory of token shards; by default the preparation's output_dir."""
    preparation: PreparationRecipe | None = None
    """How to make the shards when they are not there: a recipe of scripts/prepare_data.py."""
    sequence_length: int = 1024
    """Tokens per sequence."""

    def __post_init__(self) -> None:
        check_positive("data.", sequence_length=self.sequence_length)
        if self.path is None and self.preparation is None:
            raise ValueError("data.path is needed: a directory of token shards as scripts/prepare_data.py makes them.")

    @property
    def shards_dir(self) -> Path:
        """The directory the shards are read from."""
        if self.path is not None:
            return self.path
        assert self.preparation is not None
        return self.preparation.output_dir
