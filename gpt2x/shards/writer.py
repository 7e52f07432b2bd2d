"""Writing a split's shards, one document after the other."""

from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerFast

from gpt2x.config import PreparationRecipe
from gpt2x.errors import UserError
from gpt2x.shards.corpus import Document
from gpt2x.shards.files import token_dtype, write_shard
from gpt2x.shards.index import ShardEntry
from gpt2x.shards.tokenizer import tokenizer_fingerprint, vocabulary_size


class ShardWriter:
    """Collects a split's documents into one shard's worth of memory and writes it out when full."""

    def __init__(
        self, recipe: PreparationRecipe, tokenizer: PreTrainedTokenizerFast, split: str, numbers: Iterable[int]
    ) -> None:
        self.directory = recipe.output_dir / split
        self.directory.mkdir(parents=True, exist_ok=True)
        self.numbers = iter(numbers)
        self.vocab_size, self.eos_token_id = vocabulary_size(tokenizer), tokenizer.eos_token_id
        self.metadata = {
            "format": "gpt2x.tokens.1",
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": str(self.vocab_size),
            "eos_token_id": str(self.eos_token_id),
        }
        # Memory is taken by the pages that are written to, so a small corpus does not cost a whole shard.
        self.tokens = np.empty(recipe.tokens_per_shard, token_dtype(self.vocab_size))
        self.entries: list[ShardEntry] = []
        self._start_shard()

    def _start_shard(self) -> None:
        self.ends, self.num_bytes = [0], 0

    def add(self, document: Document, ids: np.ndarray) -> None:
        """Appends a document's ids, (num_tokens,) int64, and the end of text.

        Raises:
            UserError: for an id outside the vocabulary, which the cast to the shard's dtype would wrap silently.
        """
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise UserError(
                f"{document.name}: the tokenizer gives id {outside[0]}, outside its vocabulary of {self.vocab_size}; "
                f"repair the tokenizer or use another."
            )
        start, end = self.ends[-1], self.ends[-1] + ids.size + 1
        if end > self.tokens.size and start > 0:
            self._write()
            start, end = 0, ids.size + 1
        if end > self.tokens.size:  # a document longer than a shard gets one to itself
            self.tokens = np.empty(end, self.tokens.dtype)
        self.tokens[start : end - 1], self.tokens[end - 1] = ids, self.eos_token_id
        self.ends.append(end)
        self.num_bytes += len(document.text.encode())

    def close(self) -> list[ShardEntry]:
        """Writes what is left and returns the entries of all shards."""
        if len(self.ends) > 1:
            self._write()
        return self.entries

    def _write(self) -> None:
        name, num_tokens = f"tokens_part_{next(self.numbers):05d}.safetensors", self.ends[-1]
        sha256 = write_shard(
            self.directory / name,
            tokens=self.tokens[:num_tokens],
            documents=np.array(self.ends, np.int64),
            metadata=self.metadata,
        )
        entry = ShardEntry(
            file=name,
            num_tokens=num_tokens,
            num_documents=len(self.ends) - 1,
            num_bytes=self.num_bytes,
            sha256=sha256,
        )
        self.entries.append(entry)
        self._start_shard()
