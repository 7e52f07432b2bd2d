"""What a run reads: one source or a mixture of several, each of token files or a stream."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from gpt2x.config.checks import Count, Range, Seconds, Size, check_numbers, shown
from gpt2x.config.prepare import CorpusSection, PreparationRecipe


@dataclass(frozen=True, kw_only=True)
class StreamSection:
    """Documents that are tokenized while the run trains on them, through a bounded cache of token shards."""

    corpus: CorpusSection
    """What is streamed, of kind dataset."""
    tokenizer: str
    """Directory or Hub id of the tokenizer."""
    cache_dir: Path
    """Where the shards are kept; what is missing there is streamed again."""
    max_cached_shards: Size = 32
    """How many training shards the cache holds at most."""
    shards_per_era: Size = 8
    """Shards that are shuffled together; the first era has one, so that training starts soon."""
    tokens_per_shard: Count = 4_000_000
    """Tokens per shard at most; documents stay whole."""
    retry_s: Seconds = 600.0
    """How long a broken connection is tried again before the run saves and ends."""
    stall_s: Seconds = 120.0
    """How long nothing may arrive before the connection counts as broken."""

    def __post_init__(self) -> None:
        check_numbers(self, "stream.")
        if self.corpus.kind != "dataset":
            raise ValueError(
                f"stream.corpus.kind ({self.corpus.kind}) must be dataset; give corpus.dataset, for local files "
                f"json, parquet or text with corpus.data_files, or prepare the corpus before."
            )
        if self.max_cached_shards < 2 * self.shards_per_era:
            raise ValueError(
                f"stream.max_cached_shards ({self.max_cached_shards}) must be at least 2 x stream.shards_per_era = "
                f"{2 * self.shards_per_era}: one era is read while the next is filled."
            )


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


@dataclass(frozen=True, kw_only=True)
class SourceSection:
    """One source of a mixture: token shards, token files of other projects, or a stream."""

    name: str | None = None
    """Names the source in metrics and keys its order; by default the last part of its path."""
    path: Path | None = None
    """Directory of token shards, or token files of another project: a directory, a file or a pattern."""
    validation_path: Path | None = None
    """Held-out token files of another project, where path does not hold them under a name with `val`."""
    preparation: PreparationRecipe | None = None
    """How to make the shards when they are not there: a recipe of scripts/prepare_data.py."""
    stream: StreamSection | None = None
    """Documents to stream instead of a path."""
    tokenizer: str | None = None
    """Directory or Hub id of the tokenizer that made the token files of another project."""
    weight: Annotated[float, Range(above=0, most=10**9)] | None = None
    """Share of the training tokens, up to a common factor; by default in proportion to the source's size."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.sources.")
        places = [name for name in ("path", "preparation") if getattr(self, name) is not None]
        if self.stream is not None and places:
            raise ValueError(
                f"data.{places[0]} and data.stream exclude each other; set one of them to null, or make each one of "
                f"data.sources."
            )
        if self.stream is None and not places:
            raise ValueError(
                "data.path is needed: a directory of token shards as scripts/prepare_data.py makes them, or token "
                "files of another project; or else a stream."
            )

    @property
    def location(self) -> str:
        """Where the source's tokens are read from."""
        if self.stream is not None:
            return str(self.stream.cache_dir)
        if self.path is not None:
            return str(self.path)
        assert self.preparation is not None
        return str(self.preparation.output_dir)

    @property
    def key(self) -> str:
        """The source's name, given or taken from its place."""
        return self.name or Path(self.location).stem


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What to train on: one source, or a mixture of several."""

    path: Path | None = None
    """Directory of token shards, or token files of another project; by default the preparation's output_dir."""
    validation_path: Path | None = None
    """Held-out token files of another project, where path does not hold them under a name with `val`."""
    preparation: PreparationRecipe | None = None
    """How to make the shards when they are not there: a recipe of scripts/prepare_data.py."""
    stream: StreamSection | None = None
    """Documents to stream instead of a path."""
    tokenizer: str | None = None
    """Directory or Hub id of the tokenizer that made the token files of another project."""
    sources: list[SourceSection] = field(default_factory=list)
    """A mixture: sources with weights, in place of the fields above."""
    sequence_length: Size = 1024
    """Tokens per sequence."""
    block_size: Size = 1000
    """Sequences per block, within which the mixture's weights are kept exactly."""
    packing: Literal["continuous", "documents", "whole_documents"] = "continuous"
    """Whether tokens see what stands before them in the sequence (GPT-2), or only their own document; the third also
    cuts no document: each sequence is filled with whole ones, and what is left of it is not learned."""
    align_documents: bool = False
    """Whether sequences begin where documents begin; what a cut document has left is not read."""
    skip: str | None = None
    """Batches that are passed over, by number: 120-135, or 7, 120-135. Without any a batch has its step's number."""
    num_workers: Annotated[int, Range(least=0, most=1024)] = 1
    """Threads that read ahead; 0 reads when the step begins. Changes nothing but speed."""
    prefetch_steps: Annotated[int, Range(least=1, most=10**4)] = 2
    """How many steps are read ahead."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.")
        self.skipped_batches  # raises for what is no list of numbers  # noqa: B018
        single = {name: getattr(self, name) for name in ("path", "validation_path", "preparation", "stream")}
        given = [name for name, value in single.items() if value is not None]
        if self.sources and given:
            raise ValueError(
                f"data.{given[0]} and data.sources exclude each other; set data.{given[0]} to null or make it one of "
                f"the sources."
            )
        self.mixture  # raises for a source without a place  # noqa: B018
        if self.packing == "whole_documents":
            self._check_lengths_of_conversations()
        names = [source.key for source in self.mixture]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data.sources: two are called {shown(twice[0])}; give each its own name.")

    def _check_lengths_of_conversations(self) -> None:
        for source in self.mixture:
            chat = source.preparation.chat if source.preparation is not None else None
            if chat is not None and chat.max_length is not None and chat.max_length > self.sequence_length:
                raise ValueError(
                    f"chat.max_length ({chat.max_length}) must not exceed data.sequence_length "
                    f"({self.sequence_length}) with packing whole_documents; lower the one or raise the other."
                )

    @property
    def skipped_batches(self) -> list[tuple[int, int]]:
        """The first and the last of each stretch of batches that are passed over, in order."""
        parts = [part.strip() for part in (self.skip or "").split(",") if part.strip()]
        found = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in parts]
        pairs = sorted((int(match[1]), int(match[2] or match[1])) for match in found if match)
        is_in_order = all(first <= last for first, last in pairs)
        if len(pairs) < len(parts) or not is_in_order or any(b[0] <= a[1] for a, b in itertools.pairwise(pairs)):
            raise ValueError(
                f"data.skip ({shown(self.skip)}) must list batches that do not overlap, as 120-135 or 7, 120-135."
            )
        return pairs

    @property
    def mixture(self) -> tuple[SourceSection, ...]:
        """The sources, of which there is one where none are listed."""
        if self.sources:
            return tuple(self.sources)
        single = SourceSection(
            name="train",
            path=self.path,
            validation_path=self.validation_path,
            preparation=self.preparation,
            stream=self.stream,
            tokenizer=self.tokenizer,
        )
        return (single,)
