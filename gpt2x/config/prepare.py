"""What scripts/prepare_data.py, train_tokenizer.py and import_tokens.py run: the way from texts to token shards."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from gpt2x.config.checks import Count, Range, Seed, ShareBelowOne, Size, Workers, check_numbers, shown


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
class ChatSection:
    """Conversations in place of documents: how they are written out, and what of them is learned."""

    template: Path | None = None
    """The chat template, a Jinja file with {% generation %} around what the assistant says; null for the
    tokenizer's own."""
    special_tokens: list[str] = field(default_factory=list)
    """Tokens that the template writes and the tokenizer lacks; they are added to it."""
    end_of_turn: str | None = None
    """The token that ends what the assistant says. It becomes the tokenizer's end of text, at which whatever reads
    the model stops; null for the tokenizer's own."""
    learn: Literal["assistant", "all"] = "assistant"
    """Whether what the assistant says is learned, with the end of its turn, or the whole conversation."""
    max_length: Size | None = None
    """Conversations are cut to so many tokens at their end; with packing whole_documents at most data.sequence_length
    of the run."""
    drop_unlearned: bool = False
    """Whether conversations without anything to learn, which may be for the cut, are left out and counted, or end
    the preparation."""

    def __post_init__(self) -> None:
        check_numbers(self, "chat.")


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
class PreparationCommand(PreparationRecipe):
    """Text to token shards: what scripts/prepare_data.py runs."""

    task: Annotated[int, Range(least=0, below=10**5)] | None = None
    """Makes this part alone, of 0 to num_tasks - 1, as a job of a cluster array; null makes all that are missing and
    finishes."""


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """What scripts/train_tokenizer.py runs."""

    corpus: CorpusSection = field(default_factory=CorpusSection)
    tokenizer: TokenizerSection


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
