"""Token files of other projects as a token set: found, recognized, checked once, and read where they lie.

transformers is imported where the tokenizer is first asked for: files that are not there are told before.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2x.errors import UserError
from gpt2x.locate import check_tokenizer
from gpt2x.scan import Scan, remembered, scan_all
from gpt2x.shards.files import Shard
from gpt2x.shards.foreign.finding import find_files
from gpt2x.shards.foreign.formats import format_of, listed_documents, recorded_tokenizer
from gpt2x.shards.index import combined_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ForeignTokens:
    """A TokenSet of token files that another project wrote.

    Attributes:
        location: the path, for messages.
        tokenizer_dir: directory or Hub id of the tokenizer that made the ids.
    """

    def __init__(self, path: str, *, tokenizer: str | None, validation_path: str | None = None) -> None:
        """Finds the files; reads no tokens yet.

        Raises:
            UserError: for a path without token files, files of several formats, no tokenizer, and one that is not
                the one which the files name.
        """
        self.location = path
        self._files = find_files(path, validation_path=validation_path)
        names = {recorded_tokenizer(file): file for files in self._files.values() for file in files}
        if tokenizer is None:
            known = "".join(f", which is {name!r} as {file.name} says" for name, file in names.items() if name)
            raise UserError(
                f"'{path}' holds token files that another project wrote; name the tokenizer that made them as "
                f"data.tokenizer{known}."
            )
        for name, file in names.items():
            if name is not None and _last_part(name) != _last_part(tokenizer):
                raise UserError(
                    f"{file} was made by tokenizer {name!r}, not by data.tokenizer {tokenizer!r}; give that one, from "
                    f"the Hub or a directory of that name, or correct the .metadata file."
                )
        check_tokenizer(tokenizer, field="data.tokenizer")
        self.tokenizer_dir = tokenizer

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerFast":
        from gpt2x.tokenizers.bpe import load_tokenizer

        return load_tokenizer(self.tokenizer_dir)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer."""
        from gpt2x.tokenizers.bpe import tokenizer_fingerprint

        return tokenizer_fingerprint(self._tokenizer)

    @cached_property
    def vocab_size(self) -> int:
        """Of the tokenizer; every id is below it."""
        from gpt2x.tokenizers.bpe import vocabulary_size

        return vocabulary_size(self._tokenizer)

    @property
    def eos_token_id(self) -> int:
        """The tokenizer's end of text."""
        return self._tokenizer.eos_token_id

    def has_split(self, split: str) -> bool:
        """Whether there are files of train or of validation."""
        return bool(self._files[split])

    def open_split(self, split: str) -> list[Shard]:
        """Opens a split's files and checks them; one that is new here is read through once.

        Raises:
            UserError: for a split without files, a file that is not what it says, and an id outside the vocabulary.
        """
        return [shard for shard, _ in self._opened(split)]

    def split_fingerprint(self, split: str) -> str:
        """A sha256 of the files' content, in their order: the same wherever the same files lie."""
        return combined_sha256(found["sha256"] for _, found in self._opened(split))

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of a split's documents, without the ends of text; counted once, then remembered."""
        of = {"content": self.split_fingerprint(split), "tokenizer": self.tokenizer_fingerprint}
        return remembered("num_bytes", of, lambda: {"num_bytes": self._count_bytes(split)}, shape=dict[str, int])[
            "num_bytes"
        ]

    def _count_bytes(self, split: str) -> int:
        from gpt2x.shards.foreign.byte_counts import byte_counter

        count = byte_counter(self._tokenizer)
        return sum(count(shard) for shard in self.open_split(split))

    def _opened(self, split: str) -> list[tuple[Shard, Scan]]:
        if not self._files[split]:
            raise UserError(
                f"'{self.location}' holds no {split} tokens; name the held-out files by data.validation_path, or cut "
                f"some off by scripts/import_tokens.py."
            )
        mapped = [format_of(file).map_tokens(file, self.vocab_size) for file in self._files[split]]
        scans = scan_all([(mapped_file, tokens) for tokens, mapped_file in mapped])
        return [
            (self._shard(file, tokens, found), found)
            for file, (tokens, _), found in zip(self._files[split], mapped, scans, strict=True)
        ]

    def _shard(self, file: Path, tokens: np.ndarray, found: Scan) -> Shard:
        _check_width(file, tokens, self.vocab_size)
        shard = Shard(
            file=file,
            tokens=tokens,
            bounds=listed_documents(file, tokens.size),
            eos_token_id=self.eos_token_id,
            id_range=(found["smallest_id"], found["largest_id"]),
        )
        shard.check_token_ids(self.vocab_size)
        return shard


def _check_width(file: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Two bytes per id are the sign of a smaller vocabulary; its ids would all pass for ids of this one."""
    if vocab_size > 2**16 and tokens.dtype.itemsize < 4:
        raise UserError(
            f"{file}: its ids of {tokens.dtype.itemsize} bytes cannot be of a vocabulary of {vocab_size}; give the "
            f"tokenizer that made them."
        )


def _last_part(name: str) -> str:
    """What a Hub id and a directory of the same tokenizer have in common."""
    return name.removesuffix("/tokenizer.json").rstrip("/").rpartition("/")[2]
