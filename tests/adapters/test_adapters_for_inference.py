"""Adapters are put on the base that they name, which is looked for as any other model is."""

import json

import pytest
import torch
from adapted_models import adapted, disturb, save_stock, tokens

from gpt2x.adapters import save_adapters
from gpt2x.errors import UserError
from gpt2x.models import load_for_inference


@pytest.fixture
def adapters(stock_dir, tokenizer, tmp_path):
    """The directory of adapters, and the model that they make with their base."""
    model = disturb(adapted(stock_dir))
    save_adapters(model, tmp_path / "adapters", tokenizer)
    return tmp_path / "adapters", model.eval()


def test_they_compute_what_they_were_saved_from(adapters):
    directory, model = adapters
    loaded = load_for_inference(str(directory), dtype=torch.float32)
    assert not loaded.training
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_a_base_that_is_the_directory_of_a_run_is_its_model(tokenizer, tmp_path):
    base = save_stock("gpt2", tmp_path)
    model = disturb(adapted(base))
    save_adapters(model, tmp_path / "adapters", tokenizer)
    base.rename(tmp_path / "final")
    settings = tmp_path / "adapters" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(tmp_path)}))
    loaded = load_for_inference(str(tmp_path / "adapters"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, model.eval()(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_a_base_that_is_not_there_is_named_and_not_fetched(adapters):
    directory, _ = adapters
    settings = directory / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "runs/gone"}))
    with pytest.raises(UserError, match=f"^the adapters of {directory} belong to runs/gone, which does not exist; "):
        load_for_inference(str(directory), dtype=torch.float32)


def test_adapters_that_are_damaged_are_refused_in_one_line(adapters):
    directory, _ = adapters
    settings = directory / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"peft_type": "NONE_SUCH"}))
    with pytest.raises(UserError, match=f"^{directory} cannot be loaded: ") as refused:
        load_for_inference(str(directory), dtype=torch.float32)
    assert "\n" not in str(refused.value)
