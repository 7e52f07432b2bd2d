"""Every form by every reader: ONNX Runtime, transformers.js and llama.cpp write what transformers writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2x.config import TokenizerSection
from gpt2x.publishing.recipes import ExportRecipe
from gpt2x.shards.tokenizer import train_tokenizer, write_tokenizer

PUBLISHING = Path(__file__).parents[1] / "publishing"
sys.path.insert(0, str(PUBLISHING))
from published_models import VOCAB_SIZE, random_model  # noqa: E402

pytestmark = pytest.mark.trial

PROMPT = "def main(self):\n    return 12 + 'é'"
JAVASCRIPT = PUBLISHING / "transformers_js"
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
BIASED = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16}
GGUF_MODELS = {
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama": ("llama", {}),
    "llama tied, biased, wide heads": ("llama", BIASED),
    "llama with llama3 RoPE": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama with YaRN": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama with linear RoPE": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "qwen3": ("qwen3", {}),
}
ONNX_MODELS = {
    **{name: GGUF_MODELS[name] for name in ("gpt2", "llama with llama3 RoPE", "llama with YaRN", "qwen3")},
    "qwen3 with a sliding layer": ("qwen3", SLIDING),
    "nanochat": ("nanochat", {}),
    "gpt2x: learned positions, SwiGLU": ("gpt2x", {}),
}
JAVASCRIPT_MODELS = [(form, "float32") for form in ("gpt2", "llama", "qwen3", "nanochat")] + [("llama", "float16")]


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
    from gpt2x.publishing.onnx_generation import OnnxDecoder, generate

    model, exported = export(form, "onnx", "float32", **options)
    decoder = OnnxDecoder(exported.path.parents[1])
    decoder.eos_token_ids = []
    ids = tokenizer(PROMPT)["input_ids"]
    assert exported.difference.largest < 1e-3
    assert generate(decoder, [ids], max_new_tokens=48) == [greedy(model, ids, 48)]


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


@pytest.mark.parametrize(("form", "dtype"), JAVASCRIPT_MODELS)
def test_transformers_js_writes_the_same_text_as_transformers(export, tokenizer, form, dtype):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    installed = JAVASCRIPT / "node_modules" / "@huggingface" / "transformers" / "dist" / "transformers.node.mjs"
    library = Path(os.environ.get("TRANSFORMERS_JS", installed))
    if shutil.which("node") is None or not library.is_file():
        pytest.skip(
            "needs Node and transformers.js: `npm install --ignore-scripts` in tests/publishing/transformers_js"
        )
    model, exported = export(form, "onnx", dtype)
    directory, ids = exported.path.parents[1], tokenizer(PROMPT)["input_ids"]
    (directory / "prompt.txt").write_text(PROMPT)
    names = {"float32": "fp32", "float16": "fp16"}
    command = ["node", JAVASCRIPT / "generate.mjs", library, directory, names[dtype], json.dumps(ids), "24"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected = greedy(model, ids, 24)
    expected = expected[: expected.index(0) + 1] if 0 in expected else expected  # it stops at the end of text
    assert json.loads(ran.stdout) == {"encoded": ids, "continuation": expected}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("form", "options"), GGUF_MODELS.values(), ids=GGUF_MODELS)
def test_llama_cpp_writes_the_same_32_tokens_as_transformers(export, tokenizer, form, options, dtype):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model, exported = export(form, "gguf", dtype, **options)
    reader = llama_cpp.Llama(str(exported.path), n_ctx=128, n_threads=1, verbose=False)
    ids = reader.tokenize(PROMPT.encode(), special=True)
    drawn = reader.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    tokens = [token for token, _ in zip(drawn, range(32))]
    reader.close()
    assert ids == tokenizer(PROMPT)["input_ids"]
    assert tokens == greedy(model, ids, 32)


def test_llama_cpp_cuts_text_as_the_tokenizer_does(export, tokenizer):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    _, exported = export("llama", "gguf", "q8_0")
    reader = llama_cpp.Llama(str(exported.path), vocab_only=True, verbose=False)
    for text in (
        Path(__file__).read_text(),
        "  naïve 日本語 🙂\r\n\t x=1_000  \n\n",
        "it's we'll I'M",
        "<|endoftext|>a",
    ):
        assert reader.tokenize(text.encode(), special=True) == tokenizer(text)["input_ids"]
    reader.close()
