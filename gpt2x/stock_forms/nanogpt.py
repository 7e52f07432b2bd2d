"""Checkpoints of nanoGPT, minGPT and the projects after them: GPT-2's names in a file of torch.save.

Nothing in such a file is executed: it is read with `weights_only=True`, and refused if tensors and plain values are
not all that it holds.
"""

import pickle
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from gpt2x.stock_forms.conversion import from_stock_state_dict
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

# Where training scripts keep the weights in what they save, and what wrappers put before each name.
WEIGHT_KEYS = ("model", "state_dict", "model_state_dict")
WRAPPER_PREFIX = re.compile(r"^(module\.|_orig_mod\.|model\.(?=transformer\.|lm_head\.))+")
# The causal mask, which older versions kept as a buffer.
MASK_BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$")
LAYER_MODULES = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def from_nanogpt(
    path: str | PathLike, *, num_attention_heads: int | None = None, hidden_act: str = "gelu"
) -> GPT2XForCausalLM:
    """Loads a nanoGPT `ckpt.pt`, or a state dict with GPT-2's names.

    The shape is read off the tensors. Biases which the model was trained without are zeros, so that it is exactly a
    GPT-2. Matrices may lie as in nanoGPT's Linear or as in transformers' Conv1D.

    Args:
        path: the file.
        num_attention_heads: needed where the file has no `model_args`, as no tensor's shape tells it.
        hidden_act: nanoGPT's is `gelu`; OpenAI's weights, minGPT and nanoGPT of early 2023 use `gelu_new`.

    Raises:
        ValueError: if the file is missing, holds more than tensors and plain values (nothing is executed), is no
            GPT-2, or leaves the number of heads open.
    """
    path = Path(path)
    checkpoint = _load(path)
    model_args = checkpoint.get("model_args", {})
    weights = _gpt2_weights(checkpoint, path)
    heads = _num_heads(num_attention_heads, model_args.get("n_head"), path)
    weights = _completed(weights, path)
    config = _config(weights, heads, hidden_act=hidden_act, dropout=model_args.get("dropout", 0.0))
    state_dict = from_stock_state_dict(weights, config)
    return GPT2XForCausalLM.from_pretrained(None, config=config, state_dict=state_dict, dtype=config.dtype)


def _load(path: Path) -> Mapping[str, Any]:
    """What torch.save wrote, without executing anything."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; give the path of a ckpt.pt or .pth file.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is no file of torch.save; nothing in it was "
            "executed. Save its state_dict() alone."
        ) from error
    except (RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no file of torch.save; copy it again.") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__} but must hold a dict; save its state_dict().")
    return checkpoint


def _gpt2_weights(checkpoint: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of GPT2LMHeadModel, without wrappers and buffers."""
    nested = [checkpoint[key] for key in WEIGHT_KEYS if isinstance(checkpoint.get(key), Mapping)]
    named = {WRAPPER_PREFIX.sub("", name): tensor for name, tensor in (nested or [checkpoint])[0].items()}
    if "wte.weight" in named:
        named = {name if name.startswith("lm_head.") else f"transformer.{name}": w for name, w in named.items()}
    if "transformer.wte.weight" not in named:
        raise ValueError(f"{path} has no transformer.wte.weight, so it holds no GPT-2; load it by its own code.")
    return {name: tensor for name, tensor in named.items() if not MASK_BUFFER.search(name)}


def _num_heads(asked: int | None, found: int | None, path: Path) -> int:
    if asked is not None and found is not None and asked != found:
        raise ValueError(f"num_attention_heads ({asked}) must be {found}, as {path} says n_head; leave it out.")
    heads = asked if asked is not None else found
    if heads is None:
        raise ValueError(
            f"{path} does not say how many heads its attention has; give num_attention_heads (GPT-2 124M has 12)."
        )
    return heads


def _completed(weights: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """All tensors of GPT2LMHeadModel in its layouts: zeros for missing biases, matrices of Linear transposed."""
    width = weights["transformer.wte.weight"].shape[1]
    layers = {int(found[1]) for name in weights if (found := re.match(r"transformer\.h\.(\d+)\.", name))}
    modules = [
        f"transformer.h.{layer}.{module}" for layer in range(max(layers, default=0) + 1) for module in LAYER_MODULES
    ]
    tables = ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight")
    completed: dict[str, torch.Tensor] = {name: weights[name] for name in tables if name in weights}
    for module in [*modules, "transformer.ln_f"]:
        weight = weights.get(f"{module}.weight")
        if weight is None:
            raise ValueError(f"{path} lacks {module}.weight, which a GPT-2 needs; use a complete checkpoint.")
        is_linear = weights.get("transformer.h.0.attn.c_attn.weight", weight).shape[-1] == width
        completed[f"{module}.weight"] = weight.T.contiguous() if weight.ndim == 2 and is_linear else weight
        bias = weights.get(f"{module}.bias")
        completed[f"{module}.bias"] = (
            weight.new_zeros(completed[f"{module}.weight"].shape[-1]) if bias is None else bias
        )
    foreign = sorted(weights.keys() - completed.keys())
    if foreign or "transformer.wpe.weight" not in completed:
        what = f"holds {foreign[0]}, which no GPT-2 has" if foreign else "lacks transformer.wpe.weight"
        raise ValueError(f"{path} {what}; load it by its own code.")
    return completed


def _config(weights: dict[str, torch.Tensor], heads: int, *, hidden_act: str, dropout: float) -> GPT2XConfig:
    embedding = weights["transformer.wte.weight"]
    head = weights.get("lm_head.weight", embedding)
    end_of_text = 50256 if embedding.shape[0] > 50256 else None
    return GPT2XConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=weights["transformer.h.0.mlp.c_fc.bias"].shape[0],
        num_hidden_layers=sum(name.endswith(".ln_1.weight") for name in weights),
        num_attention_heads=heads,
        max_position_embeddings=weights["transformer.wpe.weight"].shape[0],
        hidden_act=hidden_act,
        tie_word_embeddings=torch.equal(head, embedding),
        attention_dropout=dropout,
        hidden_dropout=dropout,
        embedding_dropout=dropout,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        dtype=embedding.dtype,
    )
