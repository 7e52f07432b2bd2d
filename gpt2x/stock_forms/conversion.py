"""Stock forms <-> gpt2x, lossless both ways: pure functions on configs and state dicts.

Shapes: H heads, E half the width of a head.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from modeling_gpt2x import GPT2XConfig

STOCK_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "nanochat": "NanoChatForCausalLM",
}

# What a stock form implies: these options have one value only.
_NO_EXTRAS = {"embedding_norm": False, "layer_types": None, "sliding_window": None}
_ROPE = {"position_embedding": "rope", "hidden_dropout": 0.0, "embedding_dropout": 0.0}
_LLAMA = {**_ROPE, "norm": "rms_norm", "gated_mlp": True, "final_logit_softcapping": None}
_IMPLIED: dict[str, dict[str, Any]] = {
    "gpt2": {
        **_NO_EXTRAS,
        "position_embedding": "learned",
        "norm": "layer_norm",
        "gated_mlp": False,
        "attention_bias": True,
        "mlp_bias": True,
        "qk_norm": "none",
        "final_logit_softcapping": None,
    },
    "llama": {**_NO_EXTRAS, **_LLAMA, "qk_norm": "none"},
    "qwen3": {**_LLAMA, "embedding_norm": False, "mlp_bias": False, "qk_norm": "weight"},
    "nanochat": {
        **_NO_EXTRAS,
        **_ROPE,
        "norm": "rms_norm_weightless",
        "gated_mlp": False,
        "mlp_bias": False,
        "qk_norm": "weightless",
        "embedding_norm": True,
    },
}

# gpt2x option -> field of the stock config.
_SHARED_FIELDS = (
    *("vocab_size", "initializer_range", "use_cache", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_LLAMA_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "hidden_act", "attention_bias", "attention_dropout", "rope_parameters"),
)


def _llama_fields(*names: str) -> dict[str, str]:
    return {name: name for name in (*_SHARED_FIELDS, *_LLAMA_FIELDS, *names)} | {"norm_eps": "rms_norm_eps"}


_FIELDS: dict[str, dict[str, str]] = {
    "gpt2": {
        **{name: name for name in _SHARED_FIELDS},
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "attention_dropout": "attn_pdrop",
        "hidden_dropout": "resid_pdrop",
        "embedding_dropout": "embd_pdrop",
    },
    "llama": _llama_fields("head_dim", "mlp_bias"),
    "qwen3": _llama_fields("head_dim", "layer_types", "sliding_window"),
    "nanochat": _llama_fields("final_logit_softcapping"),
}

# Fields of stock configs that change the computation in a way GPT2X has no option for.
_ONLY_VALUES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
}


def stock_model_type(config: GPT2XConfig) -> str:
    """The transformers model type that expresses `config` exactly: gpt2, llama, qwen3 or nanochat.

    Raises:
        ValueError: if there is none; it names the options that prevent the nearest one.
    """
    obstacles = {model_type: _obstacles(config, model_type) for model_type in _IMPLIED}
    nearest = min(obstacles, key=lambda model_type: len(obstacles[model_type]))
    if not obstacles[nearest]:
        return nearest
    differences = ", ".join(
        f"{name} must be {needed!r} but is {getattr(config, name)!r}" for name, needed in obstacles[nearest].items()
    )
    raise ValueError(
        f"No stock class expresses this model; the nearest is {STOCK_CLASSES[nearest]}: {differences}. Change that, "
        "or use save_pretrained, which saves the model with its code."
    )


def _obstacles(config: GPT2XConfig, model_type: str) -> dict[str, Any]:
    """The options in which `config` differs from a stock form, each with the value it would need."""
    needed = dict(_IMPLIED[model_type])
    if "num_key_value_heads" not in _FIELDS[model_type]:
        needed["num_key_value_heads"] = config.num_attention_heads
    if "head_dim" not in _FIELDS[model_type]:
        needed["head_dim"] = config.hidden_size // config.num_attention_heads
    obstacles = {name: value for name, value in needed.items() if _normal_value(config, name) != value}
    if model_type != "qwen3" and config.hidden_size % config.num_attention_heads != 0:
        obstacles["num_attention_heads"] = f"a divisor of hidden_size ({config.hidden_size})"
    return obstacles


def _normal_value(config: PreTrainedConfig, name: str) -> Any:
    """An option's value, where full attention in every layer is written `None`."""
    value = getattr(config, name)
    return None if name == "layer_types" and "sliding_attention" not in (value or []) else value


def to_stock_config(config: GPT2XConfig) -> PreTrainedConfig:
    """The config of the stock class which expresses `config`.

    Raises:
        ValueError: if there is none.
    """
    model_type = stock_model_type(config)
    fields = {stock: copy.deepcopy(_normal_value(config, own)) for own, stock in _FIELDS[model_type].items()}
    if model_type == "gpt2" and fields["n_inner"] == 4 * fields["n_embd"]:
        fields["n_inner"] = None
    if model_type == "qwen3":
        fields["use_sliding_window"] = fields["sliding_window"] is not None
    return AutoConfig.for_model(model_type, dtype=config.dtype, **fields)


def from_stock_config(stock_config: PreTrainedConfig) -> GPT2XConfig:
    """The GPT2XConfig that computes the same as `stock_config`.

    Raises:
        ValueError: if the model type is none of the stock forms, or if a field has a value without GPT2X option.
    """
    model_type = stock_config.model_type
    check_model_type(model_type)
    for name, value in _ONLY_VALUES.get(model_type, {}).items():
        if getattr(stock_config, name) != value:
            raise ValueError(
                f"{name} ({getattr(stock_config, name)!r}) must be {value!r} in a {model_type} config, as GPT2X has "
                "no such option; use the model's own class."
            )
    options = {own: copy.deepcopy(_normal_value(stock_config, stock)) for own, stock in _FIELDS[model_type].items()}
    if options.get("layer_types") is None:
        options["sliding_window"] = None
    return GPT2XConfig(dtype=stock_config.dtype, **{**_IMPLIED[model_type], **options})


def check_model_type(model_type: str | None) -> None:
    """Raises a ValueError unless `model_type` is one of the stock forms."""
    if model_type not in STOCK_CLASSES:
        raise ValueError(
            f"model_type ({model_type!r}) must be gpt2x or one of {', '.join(STOCK_CLASSES)}, which GPT2X converts; "
            "load other models with AutoModelForCausalLM."
        )


def to_stock_state_dict(state_dict: Mapping[str, torch.Tensor], config: GPT2XConfig) -> dict[str, torch.Tensor]:
    """The weights of a GPT2XForCausalLM under the names and in the layouts of its stock class.

    A tied head and the padding rows of a padded vocabulary are left out.

    Raises:
        ValueError: for a head that differs from the embedding where the config ties them; so in the other direction.
    """
    model_type = stock_model_type(config)
    weights = _without_duplicates(state_dict, config)
    if model_type == "gpt2":
        return _to_gpt2(weights)
    return _nanochat(weights, config, _NANOCHAT_MODULES) if model_type == "nanochat" else weights


def from_stock_state_dict(state_dict: Mapping[str, torch.Tensor], config: GPT2XConfig) -> dict[str, torch.Tensor]:
    """The weights of a stock class for the GPT2XForCausalLM of `config` = `from_stock_config(...)`."""
    model_type = stock_model_type(config)
    weights = _without_duplicates(state_dict, config)
    if model_type == "gpt2":
        return _from_gpt2(weights)
    return _nanochat(weights, config, _reversed(_NANOCHAT_MODULES)) if model_type == "nanochat" else weights


def _without_duplicates(state_dict: Mapping[str, torch.Tensor], config: GPT2XConfig) -> dict[str, torch.Tensor]:
    """Drops the tied head, and cuts padding rows off the embedding and the head."""
    weights = dict(state_dict)
    if config.tie_word_embeddings:
        head = weights.pop("lm_head.weight", None)
        table = weights.get("model.embed_tokens.weight", weights.get("transformer.wte.weight"))
        if head is not None and table is not None and not _is_same(head, table):
            raise ValueError(
                "lm_head.weight differs from the embedding, but tie_word_embeddings is true; set it to false to keep "
                "the head."
            )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights and weights[name].shape[0] > config.vocab_size:
            weights[name] = weights[name][: config.vocab_size].contiguous()
    return weights


def _is_same(head: torch.Tensor, table: torch.Tensor) -> bool:
    return head is table or head.data_ptr() == table.data_ptr() or torch.equal(head, table)


# ---------------------------------------------------------------------------------------------------------- gpt2
# gpt2x -> GPT-2; q, k and v are one matrix there. GPT-2 stores its matrices transposed (Conv1D: x @ weight).
_GPT2_MODULES = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
_GPT2_LAYER_MODULES = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def _to_gpt2(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    converted = {}
    for name, tensor in weights.items():
        module, kind = name.rsplit(".", 1)
        in_layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        if in_layer is None:
            converted[f"{_GPT2_MODULES[module]}.{kind}"] = tensor
            continue
        prefix, module = f"transformer.h.{in_layer[1]}.", in_layer[2]
        if module == "self_attn.q_proj":
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            converted[f"{prefix}attn.c_attn.{kind}"] = _transposed(torch.cat(parts))
        elif module in _GPT2_LAYER_MODULES:
            converted[f"{prefix}{_GPT2_LAYER_MODULES[module]}.{kind}"] = _transposed(tensor)
    return converted


def _from_gpt2(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    modules, layer_modules = _reversed(_GPT2_MODULES), _reversed(_GPT2_LAYER_MODULES)
    converted = {}
    for name, tensor in weights.items():
        module, kind = name.rsplit(".", 1)
        in_layer = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", module)
        if in_layer is None:
            converted[f"{modules[module]}.{kind}"] = tensor
            continue
        prefix, module = f"model.layers.{in_layer[1]}.", in_layer[2]
        if module == "attn.c_attn":
            for letter, part in zip("qkv", _transposed(tensor).chunk(3)):
                converted[f"{prefix}self_attn.{letter}_proj.{kind}"] = part.clone()
        else:
            converted[f"{prefix}{layer_modules[module]}.{kind}"] = _transposed(tensor)
    return converted


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


# ------------------------------------------------------------------------------------------------------ nanochat
_NANOCHAT_MODULES = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}


def _nanochat(
    weights: dict[str, torch.Tensor], config: GPT2XConfig, modules: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Renames modules and swaps the halves of every query and key head.

    NanoChat's RoPE turns by the negative angle, which is the positive angle on (b, a) in place of (a, b). As queries
    and keys swap alike, their products stay the same. The swap is its own inverse.
    """
    converted = {}
    for name, tensor in weights.items():
        for module, renamed in modules.items():
            name = name.replace(module, renamed)
        if re.search(r"\.(q|k)_proj\.(weight|bias)$", name):
            halves_H2E = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
            tensor = halves_H2E.flip(1).reshape(tensor.shape)
        converted[name] = tensor
    return converted


def _reversed(names: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in names.items()}
