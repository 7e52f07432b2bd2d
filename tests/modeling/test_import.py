"""Checkpoints of nanoGPT and its descendants: the same function, and nothing executed."""

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stock_models import gpt2, random_tokens
from torch import nn
from transformers import AutoModelForCausalLM

from gpt2x import from_nanogpt, save_stock

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 61, 32, 4, 2, 24
MODEL_ARGS = {
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_embd": WIDTH,
    "block_size": LENGTH,
    "vocab_size": VOCABULARY,
    "bias": True,
    "dropout": 0.1,
}


def nanogpt_weights(*, bias: bool = True) -> dict[str, torch.Tensor]:
    """A state dict as nanoGPT saves it: Linear layouts, tied head, no bias anywhere where it was trained without."""
    shapes = {"attn.c_attn": (3 * WIDTH, WIDTH), "attn.c_proj": (WIDTH, WIDTH)}
    shapes |= {"mlp.c_fc": (4 * WIDTH, WIDTH), "mlp.c_proj": (WIDTH, 4 * WIDTH)}
    weights = {"transformer.wte.weight": torch.randn(VOCABULARY, WIDTH)}
    weights["transformer.wpe.weight"] = torch.randn(LENGTH, WIDTH)
    modules = {f"transformer.h.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    modules |= {f"transformer.h.{i}.{name}": (WIDTH,) for i in range(LAYERS) for name in ("ln_1", "ln_2")}
    for module, shape in [*modules.items(), ("transformer.ln_f", (WIDTH,))]:
        weights[f"{module}.weight"] = 0.3 * torch.randn(shape)
        if bias:
            weights[f"{module}.bias"] = 0.3 * torch.randn(shape[0])
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def nanogpt_logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """nanoGPT's arithmetic, written out for one row."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights.get(f"{name}.bias"), 1e-5)

    T = tokens.shape[1]
    x = weights["transformer.wte.weight"][tokens[0]] + weights["transformer.wpe.weight"][:T]
    for layer in range(LAYERS):
        prefix = f"transformer.h.{layer}."
        q, k, v = linear(f"{prefix}attn.c_attn", norm(f"{prefix}ln_1", x)).split(WIDTH, dim=1)
        q, k, v = (part.view(T, HEADS, -1).transpose(0, 1) for part in (q, k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(WIDTH // HEADS)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + linear(f"{prefix}attn.c_proj", (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, WIDTH))
        hidden = F.gelu(linear(f"{prefix}mlp.c_fc", norm(f"{prefix}ln_2", x)))
        x = x + linear(f"{prefix}mlp.c_proj", hidden)
    return F.linear(norm("transformer.ln_f", x), weights["lm_head.weight"])


def save_checkpoint(path: Path, weights: dict[str, torch.Tensor], **model_args: Any) -> Path:
    """The whole of what nanoGPT's train.py saves."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    checkpoint = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": {**MODEL_ARGS, **model_args},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "compile": True, "lr": 1e-3},
    }
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint_gives_nanogpts_logits(bias: bool, tmp_path: Path) -> None:
    weights, tokens = nanogpt_weights(bias=bias), random_tokens(1, 20, VOCABULARY)
    model = from_nanogpt(save_checkpoint(tmp_path / "ckpt.pt", weights, bias=bias))
    torch.testing.assert_close(model(tokens).logits[0], nanogpt_logits(weights, tokens), rtol=1e-5, atol=1e-5)
    assert not model.training
    assert model.config.hidden_dropout == model.config.attention_dropout == model.config.embedding_dropout == 0.1
    assert model.config.eos_token_id is None


@pytest.mark.parametrize("bias", [True, False])
def test_an_imported_checkpoint_is_a_stock_gpt2(bias: bool, tmp_path: Path) -> None:
    weights, tokens = nanogpt_weights(bias=bias), random_tokens(1, 20, VOCABULARY)
    save_stock(from_nanogpt(save_checkpoint(tmp_path / "ckpt.pt", weights)), tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    torch.testing.assert_close(stock(tokens).logits[0], nanogpt_logits(weights, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
def test_a_bare_state_dict_is_understood_in_every_wrapper(key: str | None, prefix: str, tmp_path: Path) -> None:
    weights, tokens = nanogpt_weights(), random_tokens(1, 9, VOCABULARY)
    saved = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    saved[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, LENGTH, LENGTH).tril()
    torch.save(saved if key is None else {key: saved, "epoch": 3}, tmp_path / "model.pth")
    model = from_nanogpt(tmp_path / "model.pth", num_attention_heads=HEADS)
    torch.testing.assert_close(model(tokens).logits[0], nanogpt_logits(weights, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_prefix", [True, False])
def test_the_transposed_matrices_of_transformers_are_recognized(has_prefix: bool, tmp_path: Path) -> None:
    stock, tokens = gpt2(tie_word_embeddings=False), random_tokens(1, 9)
    saved = {name if has_prefix else name.removeprefix("transformer."): w for name, w in stock.state_dict().items()}
    torch.save(saved, tmp_path / "pytorch_model.bin")
    model = from_nanogpt(tmp_path / "pytorch_model.bin", num_attention_heads=4, hidden_act="gelu_new")
    torch.testing.assert_close(model(tokens).logits, stock(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_bare_state_dict_needs_the_number_of_heads(tmp_path: Path) -> None:
    torch.save(nanogpt_weights(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth does not say how many heads .*; give num_attention_heads"):
        from_nanogpt(tmp_path / "model.pth")


def test_a_contradicting_number_of_heads_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "ckpt.pt", nanogpt_weights())
    with pytest.raises(ValueError, match=r"num_attention_heads \(8\) must be 4, as .* says n_head; leave it out"):
        from_nanogpt(path, num_attention_heads=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"transformer.h.1.mlp.c_fc.weight": None},
            r"lacks transformer\.h\.1\.mlp\.c_fc\.weight.*complete checkpoint",
        ),
        ({"transformer.wpe.weight": None}, r"lacks transformer\.wpe\.weight; load it by its own code"),
        ({"transformer.wte.weight": None}, r"has no transformer\.wte\.weight, so it holds no GPT-2"),
        ({"transformer.h.0.moe.gate": torch.ones(2)}, r"holds transformer\.h\.0\.moe\.gate, which no GPT-2 has"),
    ],
)
def test_what_is_no_whole_gpt2_is_refused_by_name(change: dict, message: str, tmp_path: Path) -> None:
    weights = {name: w for name, w in {**nanogpt_weights(), **change}.items() if w is not None}
    with pytest.raises(ValueError, match=message) as error:
        from_nanogpt(save_checkpoint(tmp_path / "ckpt.pt", weights))
    assert "\n" not in str(error.value)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.sentinel,))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_payload_is_refused_and_never_executed(is_zip: bool, tmp_path: Path) -> None:
    checkpoint = {"model": nanogpt_weights(), "model_args": MODEL_ARGS, "payload": Payload(tmp_path / "executed")}
    if is_zip:
        torch.save(checkpoint, tmp_path / "ckpt.pt")
    else:
        (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(checkpoint, protocol=2))
    with pytest.raises(ValueError, match=r"ckpt\.pt holds more than tensors and plain values.*nothing in it was exec"):
        from_nanogpt(tmp_path / "ckpt.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"plain text\n"])
def test_a_file_that_torch_did_not_save_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"ckpt\.pt .*no file of torch\.save"):
        from_nanogpt(tmp_path / "ckpt.pt")


def test_a_missing_file_and_a_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pt is no file; give the path of a ckpt\.pt"):
        from_nanogpt(tmp_path / "absent.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds a list but must hold a dict"):
        from_nanogpt(tmp_path / "list.pt")
