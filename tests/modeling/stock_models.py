"""Small random stock models: the independent reference which GPT2X is held against."""

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gpt2x import from_stock_config, from_stock_state_dict
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

VOCAB_SIZE = 61
TOKENS: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": None}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **TOKENS,
}
# Width and heads of GPT-2 124M, medium, large and XL.
GPT2_SIZES = {"gpt2": (768, 12), "gpt2-medium": (1024, 16), "gpt2-large": (1280, 20), "gpt2-xl": (1600, 25)}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """Moves every weight, so that biases and norms are none of the neutral values they start with."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def gpt2(width: int = 32, heads: int = 4, **options: Any) -> PreTrainedModel:
    defaults = {"n_embd": width, "n_head": heads, "n_layer": 2, "n_positions": 64, **TOKENS}
    return perturbed(GPT2LMHeadModel(GPT2Config(**{**defaults, **options})))


def llama(**options: Any) -> PreTrainedModel:
    return perturbed(LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})))


def qwen3(**options: Any) -> PreTrainedModel:
    return perturbed(Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 16, **options})))


def nanochat(**options: Any) -> PreTrainedModel:
    return perturbed(NanoChatForCausalLM(NanoChatConfig(**{**SIZES, **options})))


SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 5,
}
STOCK_MODELS = {
    "gpt2": gpt2,
    "gpt2 untied, wide MLP": lambda: gpt2(tie_word_embeddings=False, n_inner=80),
    "llama": llama,
    "llama tied, biases, free head_dim": lambda: llama(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16
    ),
    "llama with llama3 RoPE": lambda: llama(rope_parameters=dict(LLAMA3_ROPE)),
    "llama with YaRN": lambda: llama(rope_parameters=dict(YARN_ROPE)),
    "qwen3": qwen3,
    "qwen3 with sliding layers": lambda: qwen3(**SLIDING),
    "nanochat": nanochat,
    "nanochat with biases": lambda: nanochat(attention_bias=True, num_key_value_heads=4),
}


def gpt2x_like(stock: PreTrainedModel) -> GPT2XForCausalLM:
    """A GPT2X model with the weights of `stock`."""
    config = from_stock_config(stock.config)
    config._attn_implementation = stock.config._attn_implementation
    model = GPT2XForCausalLM(config)
    missing, unexpected = model.load_state_dict(from_stock_state_dict(stock.state_dict(), config), strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    return model.eval()


def small_config(**options: Any) -> GPT2XConfig:
    defaults = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    return GPT2XConfig(**{**defaults, **TOKENS, **options})


MODERN: dict[str, Any] = {
    "position_embedding": "rope",
    "norm": "rms_norm",
    "hidden_act": "silu",
    "gated_mlp": True,
    "attention_bias": False,
    "mlp_bias": False,
    "qk_norm": "weight",
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def random_tokens(batch: int, length: int, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randint(2, vocab_size, (batch, length))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
