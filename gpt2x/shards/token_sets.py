"""Token sets: what a data.path holds, whoever wrote it."""

import glob
from pathlib import Path
from typing import Protocol

from gpt2x.errors import UserError
from gpt2x.locate import check_tokenizer
from gpt2x.shards.files import Shard
from gpt2x.shards.index import INDEX_FILE, Index, load_index


class TokenSet(Protocol):
    """The token ids of a corpus in files, split into train and validation."""

    @property
    def location(self) -> str:
        """The path, for messages."""

    @property
    def tokenizer_dir(self) -> str | Path | None:
        """The tokenizer that made the ids; None where nobody has said which."""

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Of that tokenizer; None where nobody knows."""

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""

    @property
    def eos_token_id(self) -> int:
        """The id between documents."""

    def has_split(self, split: str) -> bool:
        """Whether there are tokens of train or of validation."""

    def open_split(self, split: str) -> list[Shard]:
        """Opens a split's files and checks them.

        Raises:
            UserError: for a split without tokens, and for whatever is wrong with a file.
        """

    def split_fingerprint(self, split: str) -> str:
        """A sha256 of a split's content."""

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of a split's documents."""


def open_tokens(path: str, *, validation_path: str | None = None, tokenizer: str | None = None) -> TokenSet:
    """Finds out what a path holds and opens it; reads no tokens yet.

    Args:
        path: a directory of token shards, or a directory, a file or a pattern of token files of another project.
        validation_path: held-out token files of another project, where path does not tell them apart.
        tokenizer: of token files that do not say which made them.

    Raises:
        UserError: where there is nothing that can be read, and for a tokenizer that did not make the ids, as far as
            the files tell.
    """
    is_there = Path(path).exists() or glob.glob(path)
    if not is_there or (Path(path) / INDEX_FILE).is_file():
        return _open_shards(Path(path), validation_path=validation_path, tokenizer=tokenizer)
    from gpt2x.shards.foreign.token_set import ForeignTokens  # imports pyarrow

    return ForeignTokens(path, tokenizer=tokenizer, validation_path=validation_path)


def _open_shards(directory: Path, *, validation_path: str | None, tokenizer: str | None) -> Index:
    index = load_index(directory)
    if validation_path is not None:
        raise UserError(
            f"data.validation_path ({validation_path}) belongs to token files of another project; '{directory}' holds "
            f"its own validation split, so leave it out."
        )
    if tokenizer is not None:
        check_tokenizer(tokenizer, field="data.tokenizer")
        from gpt2x.tokenizers.bpe import load_tokenizer, tokenizer_fingerprint  # imports transformers

        if tokenizer_fingerprint(load_tokenizer(tokenizer)) != index.tokenizer_fingerprint:
            raise UserError(
                f"data.tokenizer ({tokenizer}) is not the one that made the shards of '{directory}'; leave it out, "
                f"and the one in {index.tokenizer_dir} is used."
            )
    return index
