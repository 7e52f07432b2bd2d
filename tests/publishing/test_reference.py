"""What an export is compared with is what the files say: a head of their own, and no tensor that is not there."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from published_models import random_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM, NanoChatForCausalLM, Qwen3ForCausalLM

from gpt2x.config.publishing import ExportRecipe
from gpt2x.errors import UserError
from gpt2x.publishing import export as export_module
from gpt2x.publishing import export as native
from gpt2x.publishing.comparison import Reference, model_logits
from gpt2x.publishing.export import export_model
from modeling_gpt2x import GPT2XForCausalLM

STOCK = {
    "gpt2": GPT2LMHeadModel,
    "llama": LlamaForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "nanochat": NanoChatForCausalLM,
}
FORMS_OF_EXPORTS = ["native", "onnx", "gguf"]


@pytest.fixture(autouse=True)
def _quiet_loader(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def change_weights(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def with_a_head_of_its_own(directory, *, rows=304):
    torch.manual_seed(1)
    change_weights(directory, lambda weights: weights.update({"lm_head.weight": torch.randn(rows, 32)}))


def export(directory, to):
    if to != "native":
        pytest.importorskip({"onnx": "onnxscript", "gguf": "gguf"}[to], reason=f"the extra {to} is not installed")
    return export_model(ExportRecipe(model=str(directory), to=to))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("form", STOCK)
def test_a_stock_form_is_read_as_its_own_class_reads_it(saved, form, is_tied):
    directory = saved(form, tie_word_embeddings=is_tied)
    with_a_head_of_its_own(directory)
    reference = Reference.read(str(directory))
    expected = STOCK[form].from_pretrained(directory, dtype=torch.float32).eval()
    assert torch.equal(expected.lm_head.weight, load_file(directory / "model.safetensors")["lm_head.weight"])
    np.testing.assert_array_equal(reference.logits, model_logits(expected, reference.ids, reference.mask))


def test_gpt2xs_form_is_read_in_another_process_by_the_code_beside_it(saved, monkeypatch):
    directory = saved("gpt2x")
    monkeypatch.setattr(GPT2XForCausalLM, "forward", None)
    reference = Reference.read(str(directory))
    monkeypatch.undo()
    expected = random_model("gpt2x")
    np.testing.assert_allclose(
        reference.logits, model_logits(expected, reference.ids, reference.mask), rtol=1e-5, atol=1e-5
    )


def test_code_that_is_not_gpt2xs_is_not_executed(saved, tmp_path):
    directory = saved("gpt2x")
    with (directory / "modeling_gpt2x.py").open("a") as code:
        code.write(f"\nopen({str(tmp_path / 'executed')!r}, 'w')\n")
    reference = Reference.read(str(directory))
    assert not (tmp_path / "executed").exists()
    np.testing.assert_array_equal(reference.logits, model_logits(random_model("gpt2x"), reference.ids, reference.mask))


def test_code_of_a_repository_that_a_config_names_is_not_executed(saved):
    directory = saved("gpt2x")
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["auto_map"] = {name: f"somebody/else--{place}" for name, place in config["auto_map"].items()}
    file.write_text(json.dumps(config))
    expected = random_model("gpt2x")
    reference = Reference.read(str(directory))
    np.testing.assert_array_equal(reference.logits, model_logits(expected, reference.ids, reference.mask))


@pytest.mark.parametrize("form", ["llama", "gpt2"])
@pytest.mark.parametrize("to", ["native", "gguf"])
def test_a_head_of_its_own_in_a_file_that_is_said_to_be_tied_is_kept(saved, form, to):
    directory = saved(form, tie_word_embeddings=True)
    with_a_head_of_its_own(directory)
    expected = STOCK[form].from_pretrained(directory, dtype=torch.float32).eval()
    exported = export(directory, to)
    assert exported.difference.largest < 1e-3
    if to == "native":
        ids = torch.arange(20)[None]
        loaded = GPT2XForCausalLM.from_pretrained(exported.path, dtype=torch.float32).eval()
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_head_that_a_conversion_drops_is_noticed(saved, monkeypatch):
    directory = saved("llama", tie_word_embeddings=True)
    with_a_head_of_its_own(directory)

    def load_without_head(name_or_path):
        change_weights(directory, lambda weights: weights.pop("lm_head.weight"))
        return GPT2XForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)

    monkeypatch.setattr(native, "load_native", load_without_head)
    with pytest.raises(UserError, match=r"the float32 export differs from the model by .* nothing was written"):
        export(directory, "native")
    assert not (directory / "exports" / "native").exists()


def test_weights_that_are_not_those_of_the_file_are_noticed(saved, monkeypatch):
    directory = saved("llama")
    other = random_model("llama")
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    monkeypatch.setattr(export_module, "load_for_inference", lambda *_, **__: other)
    with pytest.raises(UserError, match=r"the float32 export differs from the model by .* nothing was written"):
        export(directory, "gguf")
    assert not (directory / "exports" / "gguf").exists()


@pytest.mark.parametrize(
    ("form", "to"), [*product(["llama"], FORMS_OF_EXPORTS), ("gpt2x", "native"), ("gpt2x", "onnx")]
)
def test_a_model_that_lacks_a_tensor_is_refused_by_its_name(saved, form, to):
    directory = saved(form)
    change_weights(directory, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    message = rf"{form} lacks model\.layers\.1\.mlp\.up_proj\.weight, which a {form} model needs; use a complete"
    with pytest.raises(UserError, match=message):
        export(directory, to)
    assert not (directory / "exports").exists()


def test_a_tensor_of_another_shape_is_refused_by_its_name(saved):
    directory = saved("llama")
    with_a_head_of_its_own(directory, rows=300)
    message = (
        r"llama holds lm_head\.weight of the shape \(300, 32\), and by its config it has \(304, 32\); use the config"
    )
    with pytest.raises(UserError, match=message):
        export(directory, "native")


@pytest.mark.parametrize("form", ["llama", "gpt2x"])
@pytest.mark.parametrize("content", [b"abc", b"", b"\xff" * 100], ids=["cut", "empty", "other"])
@pytest.mark.parametrize("to", FORMS_OF_EXPORTS)
def test_a_damaged_model_is_refused_in_one_line(saved, form, content, to):
    directory = saved(form)
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"^.*{form} is damaged \(model\.safetensors is cut or damaged [^\n]*$"):
        export(directory, to)
    assert not (directory / "exports").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config: "{", r"config\.json is no JSON"),
        (lambda config: "[" * 100_000, r"config\.json is no JSON"),
        (lambda config: json.dumps([config]), r"config\.json is not as gpt2x writes it"),
        (lambda config: json.dumps({**config, "hidden_size": "wide"}), "hidden_size.*mend its config"),
        (
            lambda config: json.dumps({**config, "model_type": [1]}),
            r"model_type \(\[1\]\) must be gpt2, llama or qwen3",
        ),
        (lambda config: json.dumps({**config, "hidden_act": {}}), "hidden_act.*mend its config"),
    ],
    ids=["cut", "deep", "list", "type", "model_type", "activation"],
)
def test_a_damaged_config_is_refused_in_one_line(saved, change, reason):
    directory = saved("llama")
    file = directory / "config.json"
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(UserError, match=rf"^[^\n]*{reason}[^\n]*$"):
        export(directory, "gguf")


def test_an_export_does_not_take_the_place_of_its_model(saved):
    directory = saved("gpt2x")
    with pytest.raises(UserError, match=r"output \(.*gpt2x\) is the model that is exported; give another by --output"):
        export_model(ExportRecipe(model=str(directory), to="native", dtype="bfloat16", output=directory))
