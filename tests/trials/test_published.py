"""Every form by ONNX Runtime, in every precision; test_readers.py has the readers of other languages."""

import json
import sys
from pathlib import Path

import pytest
import torch

from gpt2x.config import ExportRecipe, TokenizerSection
from gpt2x.tokenizers.bpe import train_tokenizer, write_tokenizer

PUBLISHING = Path(__file__).parents[1] / "publishing"
sys.path.insert(0, str(PUBLISHING))
from published_models import VOCAB_SIZE, greedy_on_onnx, random_model  # noqa: E402

pytestmark = pytest.mark.trial

PROMPT = "def main(self):\n    return 12 + 'é'"
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
ONNX_MODELS = {
    "gpt2": ("gpt2", {}),
    "llama with llama3 RoPE": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama with YaRN": ("llama", {"rope_parameters": YARN_ROPE}),
    "qwen3": ("qwen3", {}),
    "qwen3 with a sliding layer": ("qwen3", SLIDING),
    "nanochat": ("nanochat", {}),
    "gpt2x: learned positions, SwiGLU": ("gpt2x", {}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Path(__file__).read_text()] * 2, TokenizerSection(path="unused", vocab_size=VOCAB_SIZE))


@pytest.fixture
def export(tmp_path, tokenizer, monkeypatch):
    """Exports a random model and returns it with where the export lies."""
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def call(form, to, dtype, **options):
        from gpt2x.publishing.export import export_model

        directory = tmp_path / form
        model = random_model(form, **options)
        model.save_pretrained(directory)
        write_tokenizer(tokenizer, directory)
        return model, export_model(ExportRecipe(model=str(directory), to=to, dtype=dtype))

    return call


def greedy(model, ids, length):
    """The likeliest continuation by transformers."""
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    output = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize(("form", "options"), ONNX_MODELS.values(), ids=ONNX_MODELS)
def test_onnx_runtime_writes_the_same_text_as_transformers(export, tokenizer, form, options):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    from gpt2x.publishing.onnx_decoder import OnnxDecoder

    model, exported = export(form, "onnx", "float32", **options)
    decoder = OnnxDecoder(exported.path.parents[1])
    ids = tokenizer(PROMPT)["input_ids"]
    assert exported.difference.largest < 1e-3
    assert greedy_on_onnx(decoder, [ids], 48) == [greedy(model, ids, 48)]


@pytest.mark.parametrize("form", ["gpt2", "nanochat"])
def test_eight_bits_make_a_smaller_file_that_agrees(export, form):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    sizes = {"hidden_size": 128, "intermediate_size": 512}
    options = {"n_embd": 128} if form == "gpt2" else sizes
    exports = {dtype: export(form, "onnx", dtype, **options)[1] for dtype in ("float32", "int8")}
    assert exports["int8"].num_bytes < 0.55 * exports["float32"].num_bytes
    assert exports["int8"].difference.relative < 0.1


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_weights_too_large_for_one_file_lie_beside_it(export, monkeypatch, dtype):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    from gpt2x.publishing import onnx

    monkeypatch.setattr(onnx, "LARGEST_FILE", 1000)
    _, exported = export("llama", "onnx", dtype, tie_word_embeddings=True)
    data_file = exported.path.with_name(f"{exported.path.name}_data")
    assert exported.num_bytes == exported.path.stat().st_size + data_file.stat().st_size
    assert {path.name for path in exported.path.parent.iterdir()} == {exported.path.name, data_file.name}
    config = json.loads((exported.path.parents[1] / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {exported.path.name: 1}
