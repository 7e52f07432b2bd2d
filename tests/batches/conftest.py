"""Token shards of random ids, made without a tokenizer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt2x.shards.files import write_shard
from gpt2x.shards.index import Index, ShardEntry

VOCAB_SIZE, EOS = 500, 7


@pytest.fixture
def make_index(tmp_path: Path) -> Callable[..., Index]:
    """Makes an index whose train and validation have one shard per list of document lengths (end of text included).

    Where a share is learned they are conversations: an end of text stands at every fifth token.
    """

    def make(
        train: list[list[int]],
        validation: list[list[int]] | None = None,
        *,
        name: str = "",
        learned: float | None = None,
    ) -> Index:
        generator, directory = np.random.default_rng(0), tmp_path / name
        directory.mkdir(exist_ok=True)
        splits = {"train": train, "validation": validation or []}
        entries = {
            split: [
                _entry(directory / split, number, lengths, generator, learned=learned)
                for number, lengths in enumerate(shards)
            ]
            for split, shards in splits.items()
        }
        return Index(
            directory=directory,
            splits=entries,
            tokenizer_fingerprint="f",
            vocab_size=VOCAB_SIZE,
            eos_token_id=EOS,
            recipe={},
        )

    return make


def _entry(
    directory: Path, number: int, lengths: list[int], generator: np.random.Generator, *, learned: float | None
) -> ShardEntry:
    directory.mkdir(exist_ok=True)
    documents = np.cumsum([0, *lengths])
    tokens = generator.integers(EOS + 1, VOCAB_SIZE, documents[-1]).astype(np.uint16)
    tokens[documents[1:] - 1] = EOS
    name = f"tokens_part_{number:05d}.safetensors"
    targets = None
    if learned is not None:
        tokens[4::5] = EOS
        targets = (generator.random(tokens.size) < learned).astype(np.uint8)
    sha256 = write_shard(
        directory / name,
        tokens=tokens,
        documents=documents,
        metadata={"tokenizer_fingerprint": "f"},
        targets=targets,
    )
    return ShardEntry(
        file=name, num_tokens=tokens.size, num_documents=len(lengths), num_bytes=3 * tokens.size, sha256=sha256
    )
