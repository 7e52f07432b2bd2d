"""Where tokens come from: corpora, preparation, the sources of a run."""

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from gpt2x.config.checks import Count, Range, Seconds, Seed, ShareBelowOne, Size, Workers, check_numbers, shown
from gpt2x.config.finetuning import ChatSection


@dataclass(frozen=True, kw_only=True)
class CorpusSection:
    """Where documents come from, and how they are split."""

    kind: Literal["python_stdlib", "python_packages", "python_docstrings", "files", "dataset"] = "python_stdlib"
    """The sources of this interpreter's standard library without its tests, those of every installed package, what
    the library's docstrings answer (with chat), files of one's own, or a dataset of the `datasets` library."""
    paths: list[str] = field(default_factory=list)
    """For kind files: files, folders or glob patterns of .txt, .jsonl, .json, .csv, .tsv (also .gz and .zst), .parquet
    and .arrow. A path that exists is that path, whatever letters it has."""
    dataset: str | None = None
    """For kind dataset: a Hub id, or a builder of local or remote files: json, parquet, arrow, text."""
    dataset_config: str | None = None
    """The dataset's configuration, its second argument of load_dataset."""
    dataset_split: str = "train"
    """The dataset's split that is read."""
    data_files: list[str] = field(default_factory=list)
    """The files of a builder, or of a dataset's repository: paths, patterns or fsspec URLs."""
    streaming: bool = True
    """Whether a dataset is read over the network as it is used, instead of being downloaded first."""
    text_column: str = "text"
    """The field that holds the text, of a dataset or of files with columns (all but .txt); a field of chat messages
    gives their contents."""
    document_separator: str | None = None
    """Cuts a .txt file into documents; null makes each file one document. On the command line \\n is a line end, \\t a
    tab and \\\\ a backslash; in a recipe they are so between double quotes."""
    validation_fraction: ShareBelowOne = 0.05
    """Share of the documents, chosen by the hash of their text, that is held out."""
    split_seed: Seed = 0
    """Another seed holds out other documents."""

    def __post_init__(self) -> None:
        check_numbers(self, "corpus.")
        if self.kind == "files" and not self.paths:
            raise ValueError(
                "corpus.kind (files) needs corpus.paths: files, folders or patterns, as [texts, b.jsonl]."
            )
        if self.kind != "files" and self.paths:
            raise ValueError(
                f"corpus.paths ({shown(self.paths)}) is for corpus.kind files, and kind is {self.kind}; set "
                f"corpus.kind files, or leave the paths out."
            )
        if self.kind == "dataset" and not self.dataset:
            raise ValueError(
                "corpus.kind (dataset) needs corpus.dataset: a Hub id, or json, parquet, arrow or text with "
                "corpus.data_files."
            )
        if self.kind != "dataset" and self.dataset is not None:
            raise ValueError(
                f"corpus.dataset ({shown(self.dataset)}) is for corpus.kind dataset, and kind is {self.kind}; set "
                f"corpus.kind dataset, or leave the dataset out."
            )
        if self.document_separator == "":
            raise ValueError('corpus.document_separator ("") must not be empty; null makes each file one document.')


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """Which tokenizer reads the corpus; trained on its training documents where vocab_size is given."""

    path: str
    """Directory (or Hub id) of a transformers tokenizer; a trained one is saved there."""
    vocab_size: Annotated[int, Range(least=257, most=10**8)] | None = None
    """Size of the byte-level BPE to train, special tokens included: at least 256 bytes and the end of text. null
    to use the tokenizer at path as it is."""
    eos_token: str = "<|endoftext|>"
    """The token that ends every document, of a tokenizer trained here."""

    def __post_init__(self) -> None:
        check_numbers(self, "tokenizer.")


@dataclass(frozen=True, kw_only=True)
class PreparationRecipe:
    """Text to token shards: what scripts/prepare_data.py runs."""

    output_dir: Path
    """Directory of the token shards and their index."""
    corpus: CorpusSection = field(default_factory=CorpusSection)
    tokenizer: TokenizerSection
    chat: ChatSection | None = None
    """Reads the corpus' rows as conversations, and writes beside the ids which of them are learned."""
    tokens_per_shard: Count = 100_000_000
    """Tokens per shard file at most, about 200 MB; documents stay whole."""
    num_tasks: Annotated[int, Range(least=1, most=10**5)] = 1
    """Into how many parts the corpus is cut; each is finished, or repeated after a kill, by itself."""
    num_workers: Workers | None = None
    """Processes that work on the parts; by default one per usable core, at most num_tasks. The shards do not depend
    on it."""

    def __post_init__(self) -> None:
        check_numbers(self, "")
        if self.chat is not None:
            self._check_chat()
        elif self.corpus.kind == "python_docstrings":
            raise ValueError(
                "corpus.kind (python_docstrings) has conversations alone; add chat, or set it to python_stdlib."
            )

    def _check_chat(self) -> None:
        corpus, saved_in = self.corpus, self.output_dir / "tokenizer"
        if corpus.kind not in ("files", "dataset", "python_docstrings"):
            raise ValueError(
                f"corpus.kind ({corpus.kind}) has no conversations; with chat set it to files or dataset."
            )
        for path in corpus.paths:
            if path.lower().endswith((".txt", ".txt.gz", ".txt.zst")):
                raise ValueError(
                    f"corpus.paths ({path}) has no columns, and chat reads conversations from columns; give .jsonl, "
                    f".json, .csv, .tsv, .parquet or .arrow, or leave chat out."
                )
        if corpus.text_column != "text":
            raise ValueError(
                f"corpus.text_column ({corpus.text_column}) has no effect with chat, which knows the columns of "
                f"conversations by their names; leave it out."
            )
        if Path(self.tokenizer.path).absolute() == saved_in.absolute():
            raise ValueError(
                f"tokenizer.path ({self.tokenizer.path}) must not be where the shards' own is saved, as chat changes "
                f"it; set another tokenizer.path or output_dir."
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """What scripts/train_tokenizer.py runs."""

    corpus: CorpusSection = field(default_factory=CorpusSection)
    tokenizer: TokenizerSection


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
