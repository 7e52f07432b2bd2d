"""GPT-2's initialization survives transformers' paths for code that is not its own."""

import math

import pytest
import torch
from stock_models import MODERN, small_config

from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

WIDE = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 300}


def config_for(options: dict) -> GPT2XConfig:
    return small_config(**{**options, **WIDE})


def built(path: str, config: GPT2XConfig) -> GPT2XForCausalLM:
    """Built with real tensors at once, or on the meta device as from_pretrained does."""
    if path == "meta":
        return GPT2XForCausalLM.from_pretrained(None, config=config, state_dict={})
    return GPT2XForCausalLM(config)


@pytest.mark.parametrize("options", [{}, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("path", ["direct", "meta"])
def test_residual_projections_are_scaled_and_all_else_is_not(path: str, options: dict) -> None:
    for name, parameter in built(path, config_for(options)).named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert torch.count_nonzero(parameter) == 0, name
        else:
            is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(2 * 8) if is_residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * expected, name


@pytest.mark.parametrize("path", ["direct", "meta"])
def test_zero_init_makes_each_layer_the_identity(path: str) -> None:
    model = built(path, config_for({**MODERN, "residual_init": "zero"}))
    x = torch.randn(1, 3, 128)
    cos_sin = model.model.rotary_emb(x, torch.arange(3)[None])
    assert torch.equal(model.model.layers[0](x, position_embeddings=cos_sin), x)


def test_rotary_buffers_are_made_anew_on_the_meta_path() -> None:
    direct, meta = built("direct", config_for(MODERN)), built("meta", config_for(MODERN))
    assert torch.equal(meta.model.rotary_emb.inv_freq, direct.model.rotary_emb.inv_freq)
    assert torch.equal(meta.model.rotary_emb.original_inv_freq, direct.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("path", ["direct", "meta"])
def test_tied_heads_share_their_weight_and_untied_ones_do_not(path: str) -> None:
    tied, untied = built(path, config_for({})), built(path, config_for({"tie_word_embeddings": False}))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)
