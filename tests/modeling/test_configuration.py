"""GPT2XConfig: GPT-2 by default, clear errors, no silent misspellings."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stock_models import MODERN, small_config
from transformers import AutoConfig, GPT2Config

from gpt2x import from_stock_config, stock_model_type
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

RECIPES = Path(__file__).parents[2] / "configuration" / "model"


def test_the_defaults_are_gpt2_without_dropout() -> None:
    expected = from_stock_config(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    assert GPT2XConfig().to_dict() == expected.to_dict()


def test_openais_dropout_is_kept_when_imported() -> None:
    config = from_stock_config(GPT2Config())
    assert config.hidden_dropout == config.embedding_dropout == config.attention_dropout == 0.1


def test_gpt2s_old_names_are_understood() -> None:
    old = GPT2XConfig(n_embd=64, n_layer=3, n_head=4, n_positions=32, activation_function="relu", resid_pdrop=0.1)
    new = GPT2XConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        hidden_act="relu",
        hidden_dropout=0.1,
    )
    assert old.to_dict() == new.to_dict()
    assert (old.n_embd, old.n_ctx, old.n_inner, old.head_dim) == (64, 32, 256, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 65}, r"hidden_size \(65\) must be divisible by num_attention_heads \(12\); set head_dim or"),
        ({"norm": "rms_nrm"}, r"norm \('rms_nrm'\) must be one of layer_norm, .*; did you mean 'rms_norm'\?"),
        ({"position_embedding": "alibi"}, r"position_embedding \('alibi'\) must be one of learned, rope"),
        ({"qk_norm": "on"}, r"qk_norm \('on'\) must be one of none, weight, weightless"),
        ({"residual_init": "one"}, r"residual_init \('one'\) must be one of scaled, zero"),
        ({"vocab_size": 0}, r"vocab_size \(0\) must be at least 1; set it to a positive number"),
        ({"num_key_value_heads": 5}, r"\(12\) must be a multiple of num_key_value_heads \(5\); change one"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads \(0\) must be at least 1"),
        ({"position_embedding": "rope", "head_dim": 7}, r"head_dim \(7\) must be even, as RoPE turns pairs; change"),
        ({"final_logit_softcapping": 0.0}, r"final_logit_softcapping \(0.0\) must be positive; use None"),
        ({"hidden_act": "gelu_nwe"}, r"hidden_act \('gelu_nwe'\) must be a name of .*; did you mean 'gelu_new'\?$"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout \(1.0\) must be at least 0 and below 1; use 0.0 to switch it off"),
        ({"layer_types": ["global"]}, r"layer_types contains 'global'; each entry must be one of full_attention, sl"),
        ({"layer_types": ["full_attention"]}, r"layer_types has 1 entries but num_hidden_layers is 12; give one"),
        ({"layer_types": ["sliding_attention"] * 12}, r"sliding_window \(None\) must be at least 1 .*; set sliding"),
        ({"rope_theta": 1e4}, r"rope_theta needs position_embedding='rope', but position_embedding is 'learned'; set"),
        ({"rope_parameters": {"rope_theta": 1e4}}, r"rope_parameters needs position_embedding='rope'"),
        (
            {"position_embedding": "rope", "rope_parameters": {"partial_rotary_factor": 0.5}},
            r"partial_rotary_factor \(0.5\) must be 1, as GPT2X turns whole heads; drop it",
        ),
        (
            {"position_embedding": "rope", "rope_parameters": {"rope_type": "lama3"}},
            r"rope_type \('lama3'\) must be one of .*; did you mean 'llama3'\?",
        ),
    ],
)
def test_contradictions_are_refused_with_value_rule_and_remedy(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2XConfig(**options)


@pytest.mark.parametrize(("name", "nearest"), [("hiden_size", "hidden_size"), ("norm_epsilon", "norm_eps")])
def test_unknown_keys_warn_with_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.warns(UserWarning, match=f"no option '{name}'; it has no effect; did you mean '{nearest}'\\?$"):
        GPT2XConfig(**{name: 1})


def test_a_window_without_a_layer_that_slides_warns() -> None:
    with pytest.warns(UserWarning, match=r"sliding_window \(8\) has no effect without a 'sliding_attention' .*; add"):
        GPT2XConfig(sliding_window=8)


@pytest.mark.parametrize("options", [{}, MODERN, {"position_embedding": "rope", "rope_theta": 5e5}])
def test_a_round_trip_through_a_file_changes_and_warns_nothing(options: dict, tmp_path: Path) -> None:
    config = small_config(**options, dtype="bfloat16", num_labels=3, architectures=["X"])
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    assert isinstance(loaded, GPT2XConfig)
    expected = config.to_dict()
    assert {name: loaded.to_dict()[name] for name in expected if name != "_name_or_path"} == {
        name: value for name, value in expected.items() if name != "_name_or_path"
    }


def test_rope_parameters_exist_only_with_rope() -> None:
    assert "rope_parameters" not in GPT2XConfig().to_dict()
    config = GPT2XConfig(position_embedding="rope", rope_theta=5e5)
    assert config.rope_parameters == {"rope_theta": 5e5, "rope_type": "default"}


RECIPE_MODELS: dict[str, tuple[str, int]] = {
    "gpt2": ("gpt2", 124_439_808),
    "gpt2-medium": ("gpt2", 354_823_168),
    "gpt2-large": ("gpt2", 774_030_080),
    "gpt2-xl": ("gpt2", 1_557_611_200),
    "modern-124m": ("qwen3", 124_732_416),
    "modern-350m": ("qwen3", 353_506_304),
}


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", RECIPE_MODELS)
def test_each_model_recipe_has_known_options_and_its_stated_size(name: str) -> None:
    config = GPT2XConfig(**recipe(name))  # an option that it does not know would warn
    model_type, num_parameters = RECIPE_MODELS[name]
    assert stock_model_type(config) == model_type
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT2XForCausalLM(config).parameters())
    assert f"{count:,} parameters" in (RECIPES / f"{name}.yaml").read_text()
    assert count == num_parameters


def test_the_gpt2_recipe_is_the_default() -> None:
    assert GPT2XConfig(**recipe("gpt2")).to_dict() == GPT2XConfig().to_dict()
