from pathlib import Path

import pytest
from adapted_models import STOCK, VOCAB_SIZE, make_tokenizer, save_stock
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(VOCAB_SIZE)


@pytest.fixture(params=STOCK)
def stock_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A stock model's directory, as transformers writes it."""
    return save_stock(request.param, tmp_path)
