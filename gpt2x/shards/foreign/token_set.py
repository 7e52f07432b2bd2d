"""Token files of other projects as a token set: found, recognized, checked once, read where they lie, counted.

transformers is imported where the tokenizer is first asked for: files that are not there are told before.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import decoders, pre_tokenizers

from gpt2x.errors import UserError
from gpt2x.locate import check_tokenizer
from gpt2x.scan import Scan, remembered, scan_all
from gpt2x.shards.files import Shard
from gpt2x.shards.foreign.finding import find_files
from gpt2x.shards.foreign.formats import format_of, listed_documents, recorded_tokenizer
from gpt2x.shards.index import combined_sha256
from gpt2x.shards.writer import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENS_PER_PIECE = 2**20


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
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self._tokenizer)

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer."""
        return self._vocabulary.fingerprint

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer; every id is below it."""
        return self._vocabulary.size

    @property
    def eos_token_id(self) -> int:
        """The tokenizer's end of text."""
        return self._vocabulary.eos_token_id

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

        def count() -> dict[str, int]:
            count_bytes = byte_counter(self._tokenizer)
            return {"num_bytes": sum(count_bytes(shard) for shard in self.open_split(split))}

        of = {"content": self.split_fingerprint(split), "tokenizer": self.tokenizer_fingerprint}
        return remembered("num_bytes", of, count, shape=dict[str, int])["num_bytes"]

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
        # Two bytes per id are the sign of a smaller vocabulary; its ids would all pass for ids of this one.
        if self.vocab_size > 2**16 and tokens.dtype.itemsize < 4:
            raise UserError(
                f"{file}: its ids of {tokens.dtype.itemsize} bytes cannot be of a vocabulary of {self.vocab_size}; "
                f"give the tokenizer that made them."
            )
        shard = Shard(
            file=file,
            tokens=tokens,
            bounds=listed_documents(file, tokens.size),
            eos_token_id=self.eos_token_id,
            id_range=(found["smallest_id"], found["largest_id"]),
        )
        shard.check_token_ids(self.vocab_size)
        return shard


def _last_part(name: str) -> str:
    """What a Hub id and a directory of the same tokenizer have in common."""
    return name.removesuffix("/tokenizer.json").rstrip("/").rpartition("/")[2]


def byte_counter(tokenizer: "PreTrainedTokenizerFast") -> Callable[[Shard], int]:
    """A function that gives the bytes of a shard's documents; ends of text count none.

    A byte-level tokenizer (GPT-2, Llama 3, Qwen) spells each byte as one letter, so its ids are counted by a table.
    Of any other the documents are decoded; one of more than a million tokens in pieces, which may cost or add a few
    bytes where they meet.
    """
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        lengths = _byte_lengths(tokenizer)
        return lambda shard: sum(int(lengths[part].sum()) for part in _parts(shard.tokens))

    def decoded_bytes(shard: Shard) -> int:
        documents = (shard.tokens[start:end] for start, end in pairwise(shard.documents))
        parts = (part[part != tokenizer.eos_token_id].tolist() for ids in documents for part in _parts(ids))
        texts = (tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) for ids in parts)
        return sum(len(text.encode()) for text in texts)

    return decoded_bytes


def _byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Bytes of each id, (vocab_size,) int64."""
    vocabulary, letters = tokenizer.get_vocab(), set(pre_tokenizers.ByteLevel.alphabet())
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        # A special token may be of other letters; those are themselves.
        lengths[number] = len(token) if letters.issuperset(token) else len(token.encode())
    lengths[tokenizer.eos_token_id] = 0
    return lengths


def _parts(tokens: np.ndarray) -> Iterator[np.ndarray]:
    return (tokens[start : start + TOKENS_PER_PIECE] for start in range(0, tokens.size, TOKENS_PER_PIECE))
