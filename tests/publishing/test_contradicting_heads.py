"""A file with a head of its own, whose config says it has none: every export has the logits of the stock class."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gpt2x.config.publishing import ExportRecipe
from gpt2x.publishing.export import export_model
from modeling_gpt2x import GPT2XForCausalLM


@pytest.fixture(autouse=True)
def _quiet_loader(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(params=["gpt2", "llama", "qwen3"])
def contradicting(request, saved) -> Path:
    directory = saved(request.param, tie_word_embeddings=False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return directory


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2, 42).view(2, 20)).logits


@pytest.mark.parametrize("form", ["native", "gguf"])
def test_the_head_is_exported(contradicting: Path, form: str, tmp_path: Path) -> None:
    if form == "gguf":
        pytest.importorskip("gguf", reason="the extra gguf is not installed")
    stock = AutoModelForCausalLM.from_pretrained(contradicting)
    written = export_model(ExportRecipe(model=str(contradicting), to=form, output=tmp_path / "out"))
    if form == "native":
        exported = GPT2XForCausalLM.from_pretrained(written.path)
    else:
        stock.config.tie_word_embeddings = False
        file = written.path if written.path.is_file() else next(written.path.glob("*.gguf"))
        exported = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=stock.config)
    torch.testing.assert_close(logits(exported), logits(stock), rtol=1e-4, atol=1e-3)
    assert written.difference.same_choices == 1.0


def test_a_native_export_is_compared_with_what_the_stock_class_reads(
    contradicting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the head dropped on the way, the comparison would see it."""
    from gpt2x.errors import UserError
    from gpt2x.publishing import export as native

    def load_tied(directory: str) -> GPT2XForCausalLM:
        model = GPT2XForCausalLM.from_pretrained(directory)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    monkeypatch.setattr(native, "load_native", load_tied)
    with pytest.raises(UserError, match="differ"):
        export_model(ExportRecipe(model=str(contradicting), to="native", output=tmp_path / "out"))
