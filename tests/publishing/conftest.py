"""Small saved models with a tokenizer: what the exports start from."""

from collections.abc import Callable
from pathlib import Path

import pytest
from published_models import VOCAB_SIZE, random_model
from transformers import PreTrainedTokenizerFast

from gpt2x.config import TokenizerSection
from gpt2x.tokenizers.bpe import train_tokenizer, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [Path(__file__).read_text()] * 2
    return train_tokenizer(texts, TokenizerSection(path="unused", vocab_size=VOCAB_SIZE))


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Saves a model of a form with the tokenizer and returns its directory."""

    def save(form: str, **options: object) -> Path:
        directory = tmp_path / form
        random_model(form, **options).save_pretrained(directory)
        write_tokenizer(tokenizer, directory)
        return directory

    return save
