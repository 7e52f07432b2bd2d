"""Small random models of every form, whose weights all matter."""

from collections.abc import Callable

import numpy as np
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

from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

VOCAB_SIZE = 300
ROWS = 304
SHAPE = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2_SHAPE = {
    "vocab_size": ROWS,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FORMS: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": lambda **options: GPT2LMHeadModel(GPT2Config(**{**GPT2_SHAPE, **options})),
    "llama": lambda **options: LlamaForCausalLM(LlamaConfig(**{**SHAPE, **options})),
    "qwen3": lambda **options: Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "head_dim": 16, **options})),
    "nanochat": lambda **options: NanoChatForCausalLM(NanoChatConfig(**{**SHAPE, **options})),
    "gpt2x": lambda **options: GPT2XForCausalLM(
        GPT2XConfig(**{**SHAPE, "gated_mlp": True, "hidden_act": "silu", **options})
    ),
}


def random_model(form: str, **options: object) -> PreTrainedModel:
    """A model of a form whose every weight matters, and whose greedy text does not soon repeat itself."""
    torch.manual_seed(0)
    model = FORMS[form](**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.ndim == 2 else 0.05)
    return model


def greedy_on_onnx(decoder, prompts, length):
    """The likeliest continuations of prompts, read as one left-padded batch, then a token at a time from the cache."""
    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache, found = decoder.empty_cache(len(prompts)), []
    for _ in range(length):
        logits, cache = decoder.step(ids, mask, cache)
        ids = logits[:, -1:].argmax(-1)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        found.append(ids)
    return np.concatenate(found, axis=1).tolist()
