"""Tokenizers, ids and directories that the tests of foreign token files share."""

from pathlib import Path

import foreign_files as written
import numpy as np
import pytest
from huggingface_hub import constants

from gpt2x.tokenizers.bpe import load_tokenizer

TEXTS = [f"document {number}: the foxes jump över {number**3} dögs\n" for number in range(40)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> str:
    return written.tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def large_tokenizer(tmp_path_factory) -> str:
    return written.large_tokenizer(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def documents(tokenizer) -> list[list[int]]:
    """Forty documents, each with its end of text, which is 0."""
    return [[*load_tokenizer(tokenizer)(text)["input_ids"], 0] for text in TEXTS]


@pytest.fixture
def ids(documents) -> list[int]:
    return np.concatenate(documents).tolist()


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "gpt2x"


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path / "files"
