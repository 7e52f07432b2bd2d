"""GGUF files: read back by gguf's reader and by transformers' loader; what they cannot hold is refused."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from published_models import random_model
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM

from gpt2x.errors import UserError
from gpt2x.publishing.comparison import Reference

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

from gpt2x.publishing.gguf import check_expressible, check_gguf, write_gguf  # noqa: E402
from gpt2x.publishing.gguf_tokenizer import pre_tokenizer_name  # noqa: E402

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama": ("llama", {}),
    "llama tied, biased, wide heads": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama with llama3 RoPE": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama with YaRN": ("llama", {"rope_parameters": YARN_ROPE}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(autouse=True)
def _quiet_loader(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def written(tmp_path, tokenizer):
    """Writes a model and returns it with the file."""

    def write(form, dtype="float32", **options):
        model, file = random_model(form, **options), tmp_path / "model.gguf"
        write_gguf(model, tokenizer, file, dtype=dtype, name="tiny")
        return model, file

    return write


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize(("form", "options"), MODELS.values(), ids=MODELS)
def test_transformers_loads_the_model_that_was_written(written, form, options):
    model, file = written(form, **options)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=model.config).eval()
    ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-3, rtol=0)
    assert check_gguf(file, model, Reference.of(model), dtype="float32").same_choices == 1.0


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
@pytest.mark.parametrize("form", ["gpt2", "llama", "qwen3"])
def test_a_smaller_type_differs_by_its_rounding_only(written, form, dtype):
    model, file = written(form, dtype)
    assert check_gguf(file, model, Reference.of(model), dtype=dtype).relative < {"float16": 0.005, "q8_0": 0.05}[dtype]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_up.weight"] == {"float16": "F16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_rows_that_are_no_whole_blocks_stay_in_half_precision(written):
    _, file = written("llama", "q8_0", hidden_size=48, head_dim=12)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_llamas_heads_are_turned_in_pairs_and_qwen3s_in_halves(written):
    for form, expected in (("llama", [0, 4, 1, 5, 2, 6, 3, 7]), ("qwen3", list(range(8)))):
        model, file = written(form, head_dim=8)
        query = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "blk.0.attn_q.weight")
        rows = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
        np.testing.assert_array_equal(query.data[:8], rows[expected])


def test_the_tokenizer_is_written_with_its_merges_and_special_tokens(written, tokenizer):
    _, file = written("llama")
    found = fields(file)
    vocabulary = tokenizer.get_vocab()
    tokens = found["tokenizer.ggml.tokens"]
    assert {token: tokens.index(token) for token in vocabulary} == vocabulary
    assert tokens[300:] == [f"[UNUSED{token_id}]" for token_id in range(300, 304)]
    kinds = gguf.TokenType
    assert found["tokenizer.ggml.token_type"][0] == kinds.CONTROL
    assert found["tokenizer.ggml.token_type"][1:] == [kinds.NORMAL] * 299 + [kinds.UNUSED] * 4
    assert len(found["tokenizer.ggml.merges"]) == 300 - 257
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.bos_token_id"]) == (0, 0)
    assert not found["tokenizer.ggml.add_bos_token"]


def test_a_tensor_that_was_written_wrongly_is_found(written):
    model, file = written("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.01
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight differs by 0\.01 in the float32 export"):
        check_gguf(file, model, Reference.of(model), dtype="float32")


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("nanochat", {}, r"model_type \(nanochat\) must be gpt2, llama or qwen3, the forms that llama\.cpp computes"),
        ("gpt2x", {}, r"model_type \(gpt2x\) must be gpt2, llama or qwen3"),
        (
            "gpt2",
            {"activation_function": "relu"},
            r"activation_function \(relu\) must be gelu_new or gelu_pytorch_tanh",
        ),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act \(gelu\) must be silu in a llama model"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx \(True\) must be False"),
        ("qwen3", {"attention_bias": True}, r"attention_bias \(True\) must be False in a qwen3 model"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            r"use_sliding_window \(True\) must be False in a qwen3 model",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"rope_parameters \(.*dynamic.*\) must be of type default, linear, llama3, yarn",
        ),
        (
            "llama",
            {"rope_parameters": {**YARN_ROPE, "attention_factor": 2.0}},
            r"rope_parameters \(.*\) must be of type .* yarn with its factor only",
        ),
    ],
)
def test_what_gguf_cannot_hold_is_refused_by_name(form, options, message):
    with pytest.raises(UserError, match=message):
        check_expressible(random_model(form, **options).config)


# ------------------------------------------------------------------------------------------------------ tokenizers
def cut_by(*steps):
    return {
        "model": {"type": "BPE"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [as_json(step) for step in steps]},
    }


def as_json(pre_tokenizer):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    return json.loads(backend.to_str())["pre_tokenizer"]


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES], "llama-bpe"),
        ([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES], "qwen2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
    ],
)
def test_the_pattern_is_written_by_llama_cpps_name(steps, name):
    assert pre_tokenizer_name(cut_by(*steps)) == name


@pytest.mark.parametrize(
    "steps",
    [
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), BYTES],
        [pre_tokenizers.Whitespace()],
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(steps):
    with pytest.raises(UserError, match=r"the tokenizer \(BPE, pre-tokenizer .*\) is none that llama\.cpp knows"):
        pre_tokenizer_name(cut_by(*steps))


def test_a_tokenizer_larger_than_the_model_is_refused(written):
    with pytest.raises(UserError, match=r"vocab_size \(299\) must be more than the tokenizer's largest id \(299\)"):
        written("llama", vocab_size=299)


def test_a_normalizer_is_refused_where_llama_cpp_has_none(tmp_path, tokenizer):
    changed = deepcopy(tokenizer)
    changed.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"the tokenizer's normalizer \(Lowercase\) must be none"):
        write_gguf(random_model("llama"), changed, tmp_path / "model.gguf", dtype="float32", name="tiny")
