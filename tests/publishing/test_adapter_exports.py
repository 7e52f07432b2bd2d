"""Adapters are exported merged into their base, whatever the form."""

import json
import shutil

import numpy as np
import pytest
import torch
from published_models import random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2x.adapters import add_adapters, save_adapters
from gpt2x.config import ExportRecipe, LoraSection
from gpt2x.errors import UserError
from gpt2x.publishing.export import export_model
from modeling_gpt2x import GPT2XForCausalLM

IDS = torch.arange(3, 15)[None]


@pytest.fixture
def adapted(saved, tmp_path):
    """A LoRA run's directory with adapters that do something, and the logits of base and adapters by peft."""
    base = saved("llama")
    plain = random_model("llama")
    plain.name_or_path = plain.config._name_or_path = str(base)
    model = add_adapters(plain, LoraSection(rank=2, target_modules=["q_proj", "up_proj"]), seed=0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapters(model, tmp_path / "run" / "final", AutoTokenizer.from_pretrained(base))
    with torch.no_grad():
        logits = model(IDS).logits
        assert not torch.allclose(logits, random_model("llama")(IDS).logits, atol=0.1)
    return tmp_path / "run", logits


def logits_of_native(export):
    return GPT2XForCausalLM.from_pretrained(export.path)(IDS).logits


def logits_of_gguf(export):
    model = AutoModelForCausalLM.from_pretrained(
        export.path.parent, gguf_file=export.path.name, config=random_model("llama").config
    )
    return model.eval()(IDS).logits


def logits_of_onnx(export):
    from gpt2x.publishing.onnx_decoder import OnnxDecoder

    decoder = OnnxDecoder(export.path.parents[1], num_threads=1)
    return torch.from_numpy(decoder.step(IDS.numpy(), np.ones_like(IDS.numpy()), decoder.empty_cache(1))[0])


@pytest.mark.parametrize(
    ("form", "library", "logits_of"),
    [
        ("native", "peft", logits_of_native),
        ("gguf", "gguf", logits_of_gguf),
        pytest.param("onnx", "onnxscript", logits_of_onnx, marks=pytest.mark.trial),  # the tracer takes 20 s
    ],
)
def test_a_lora_run_is_exported_as_the_model_that_adapters_and_base_make(
    adapted, form, library, logits_of, monkeypatch
):
    pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    run_dir, expected = adapted
    export = export_model(ExportRecipe(model=str(run_dir), to=form))
    assert run_dir / "exports" / form in (export.path, *export.path.parents)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(export), expected, atol=1e-3, rtol=0)


def test_adapters_without_their_base_are_refused(adapted):
    run_dir, _ = adapted
    config = json.loads((run_dir / "final" / "adapter_config.json").read_text())
    shutil.rmtree(config["base_model_name_or_path"])
    with pytest.raises(UserError, match=r"belong to .*llama, which does not exist; put that model there, or"):
        export_model(ExportRecipe(model=str(run_dir), to="native"))
