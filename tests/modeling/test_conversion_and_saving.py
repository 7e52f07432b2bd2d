"""Stock forms and back, bit for bit; files that strangers load."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_models import MODERN, STOCK_MODELS, VOCAB_SIZE, gpt2, gpt2x_like, llama, random_tokens, small_config
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    MistralConfig,
    PreTrainedModel,
)

import gpt2x
from gpt2x import from_stock_config, save_stock, stock_model_type, to_stock_config, to_stock_state_dict
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM, GPT2XModel

SAVED_NOT_COMPUTED = {"_name_or_path", "architectures", "transformers_version", "dtype"}


@pytest.mark.parametrize("name", STOCK_MODELS)
def test_stock_to_gpt2x_to_stock_is_bit_exact(name: str, tmp_path: Path) -> None:
    stock = STOCK_MODELS[name]()
    stock.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    model = GPT2XForCausalLM.from_pretrained(tmp_path / "stock")
    save_stock(model, tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert type(again) is type(stock)
    assert not any(loading.values())
    for key, tensor in stock.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    expected, actual = stock.config.to_dict(), again.config.to_dict()
    assert {k: v for k, v in actual.items() if v != expected.get(k)}.keys() <= SAVED_NOT_COMPUTED


@pytest.mark.parametrize(
    ("model", "theta", "scaling"),
    [
        (gpt2, None, None),
        (lambda: llama(rope_theta=5e5), 5e5, None),
        (
            STOCK_MODELS["llama with YaRN"],
            1000.0,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_rope_is_also_where_transformers_4_and_mistral_rs_look_for_it(
    model: Callable[[], PreTrainedModel], theta: float | None, scaling: dict | None, tmp_path: Path
) -> None:
    save_stock(gpt2x_like(model()), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields.get("rope_theta"), fields.get("rope_scaling")) == (theta, scaling)


@pytest.mark.parametrize("name", STOCK_MODELS)
def test_gpt2x_to_stock_to_gpt2x_keeps_every_option(name: str) -> None:
    config = from_stock_config(STOCK_MODELS[name]().config)
    assert from_stock_config(to_stock_config(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"norm": "rms_norm"}, "norm must be 'layer_norm' but is 'rms_norm'"),
        ({"attention_bias": False}, "GPT2LMHeadModel: attention_bias must be True but is False"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be 4 but is 2"),
        ({"head_dim": 16}, "head_dim must be 8 but is 16"),
        ({**MODERN, "embedding_norm": True}, "Qwen3ForCausalLM: embedding_norm must be False but is True"),
        ({**MODERN, "final_logit_softcapping": 9.0}, "final_logit_softcapping must be None but is 9.0"),
        ({**MODERN, "hidden_dropout": 0.1}, "hidden_dropout must be 0.0 but is 0.1"),
        (
            {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
            "GPT2LMHeadModel: layer_types must be None",
        ),
        (
            {**MODERN, "qk_norm": "none", "mlp_bias": True, "hidden_size": 30, "head_dim": 8},
            "num_attention_heads must be 'a divisor of hidden_size",
        ),
    ],
)
def test_saving_stock_names_the_option_that_prevents_it(options: dict, field: str, tmp_path: Path) -> None:
    model = GPT2XForCausalLM(small_config(**options))
    with pytest.raises(ValueError, match=rf"No stock class expresses this model.*{field}.*save_pretrained") as error:
        save_stock(model, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "field", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"]
)
def test_stock_fields_without_an_option_are_refused_by_name(field: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{field} \(True\) must be False in a gpt2 config.*use the model's own class"
    ):
        from_stock_config(GPT2Config(**{field: True}))


@pytest.mark.parametrize("model_class", [GPT2XForCausalLM, GPT2XModel])
def test_foreign_model_types_are_refused(model_class: type[GPT2XForCausalLM], tmp_path: Path) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model_type \('bert'\) must be gpt2x or one of gpt2, llama, qwen3, nanochat"
    ):
        model_class.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type \('mistral'\)"):
        from_stock_config(MistralConfig())


def test_a_stock_checkpoint_with_missing_weights_is_refused(tmp_path: Path) -> None:
    stock = gpt2()
    weights = {k: v for k, v in stock.state_dict().items() if k not in ("transformer.ln_f.weight", "lm_head.weight")}
    stock.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks transformer.ln_f.weight, which a gpt2 model needs; use a complete"):
        GPT2XForCausalLM.from_pretrained(tmp_path)


def test_options_and_dtype_may_be_given_while_converting(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    model = GPT2XForCausalLM.from_pretrained(
        tmp_path, hidden_dropout=0.3, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert model.config.hidden_dropout == model.model.layers[0].hidden_dropout == 0.3
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_the_headless_model_converts_too(tmp_path: Path) -> None:
    stock, tokens = llama(), random_tokens(1, 6)
    stock.save_pretrained(tmp_path)
    model = GPT2XModel.from_pretrained(tmp_path)
    torch.testing.assert_close(model(tokens).last_hidden_state, stock.model(tokens).last_hidden_state)


def test_save_stock_takes_gathered_weights_and_writes_float32(tmp_path: Path) -> None:
    model = gpt2x_like(gpt2()).to(torch.bfloat16)
    gathered = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
    save_stock(model, tmp_path, state_dict=gathered)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(w.dtype == torch.float32 and torch.all(w == 0.5) for w in weights.values())
    assert "lm_head.weight" not in weights
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    save_stock(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_save_stock_cuts_the_padding_rows_of_the_vocabulary() -> None:
    model = gpt2x_like(llama())
    padded = dict(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        padded[name] = torch.nn.functional.pad(padded[name], (0, 0, 0, 3))
    weights = to_stock_state_dict(padded, model.config)
    assert weights["lm_head.weight"].shape[0] == weights["model.embed_tokens.weight"].shape[0] == VOCAB_SIZE


def test_no_conversion_mapping_is_left_registered(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "stock")
    model = GPT2XForCausalLM.from_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "own")
    names = load_file(tmp_path / "own" / "model.safetensors").keys()
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not any("c_attn" in name for name in names)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_gpt2x_form_round_trips_through_the_auto_classes(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model, tokens = gpt2x_like(make()), random_tokens(1, 6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is GPT2XForCausalLM
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_resized_embeddings_are_saved() -> None:
    model = GPT2XForCausalLM(small_config())
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.vocab_size == 70
    assert model(random_tokens(1, 4)).logits.shape[-1] == 70
    assert to_stock_state_dict(model.state_dict(), model.config)["transformer.wte.weight"].shape[0] == 70


# ------------------------------------------------------------------------------- processes that know no gpt2x
WITHOUT_GPT2X = "import sys; sys.modules.update(dict.fromkeys(['gpt2x', 'modeling_gpt2x']))\n"


def run_clean(code: str, directory: Path, guard: str = WITHOUT_GPT2X) -> str:
    """Runs `code` in a process that cannot import our packages; returns what it prints."""
    environment = {"HF_HOME": str(directory / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(gpt2x.__file__).parents[1])
    command = [sys.executable, "-c", guard + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("form", ["stock", "gpt2x"])
def test_a_process_without_gpt2x_loads_the_model_and_generates_the_same(form: str, tmp_path: Path) -> None:
    model = gpt2x_like(gpt2())
    if form == "stock":
        save_stock(model, tmp_path / "model")
    else:
        model.save_pretrained(tmp_path / "model")
    output = run_clean(
        f"""
        import torch
        from transformers import AutoModel, AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code={form == "gpt2x"})
        base = AutoModel.from_pretrained("model", trust_remote_code={form == "gpt2x"})
        print(type(model).__name__, type(base).__name__)
        print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, pad_token_id=0).tolist())
        """,
        tmp_path,
    )
    names = {"stock": "GPT2LMHeadModel GPT2Model", "gpt2x": "GPT2XForCausalLM GPT2XModel"}[form]
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, pad_token_id=0).tolist()
    assert output.splitlines()[-2:] == [names, str(tokens)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_process_without_gpt2x_refuses_a_stock_model_in_one_line(name: str, tmp_path: Path) -> None:
    gpt2x_like(gpt2()).save_pretrained(tmp_path / "model")
    STOCK_MODELS[name]().save_pretrained(tmp_path / "stock")
    output = run_clean(
        """
        from transformers import AutoModelForCausalLM
        model_class = type(AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True))
        try:
            model_class.from_pretrained("stock")
        except ValueError as error:
            print(error)
        """,
        tmp_path,
    )
    assert output.splitlines()[-1] == (
        f"stock is a {name} model and no gpt2x one; install the package gpt2x, which converts stock models, or load "
        "it with AutoModelForCausalLM."
    )


def test_a_process_without_gpt2x_refuses_weights_that_are_not_whole(tmp_path: Path) -> None:
    model = gpt2x_like(llama())
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    output = run_clean(
        """
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
        except ValueError as error:
            print(error)
        """,
        tmp_path,
    )
    assert output.splitlines()[-1] == (
        "model lacks model.norm.weight, which a gpt2x model needs; use a complete checkpoint."
    )


def test_the_code_beside_a_model_converts_a_stock_one_where_gpt2x_is_installed(tmp_path: Path) -> None:
    stock = llama()
    gpt2x_like(gpt2()).save_pretrained(tmp_path / "model")
    stock.save_pretrained(tmp_path / "stock")
    output = run_clean(
        """
        import torch
        from transformers import AutoModelForCausalLM
        model_class = type(AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True))
        model = model_class.from_pretrained("stock")
        print(model_class.__module__.split(".")[0], model(torch.tensor([[5, 6, 7]])).logits.argmax(-1).tolist())
        """,
        tmp_path,
        guard="",
    )
    tokens = stock(torch.tensor([[5, 6, 7]])).logits.argmax(-1).tolist()
    assert output.splitlines()[-1] == f"transformers_modules {tokens}"


def test_gpt2x_loads_its_stock_forms_when_they_are_asked_for() -> None:
    code = "import sys, gpt2x; print('torch' in sys.modules, gpt2x.save_stock.__module__, 'torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "False gpt2x.stock_forms.pretrained True\n"
    with pytest.raises(AttributeError, match="module 'gpt2x' has no attribute 'save_stok'"):
        gpt2x.save_stok  # noqa: B018


def test_the_stock_class_of_the_default_is_gpt2() -> None:
    assert stock_model_type(GPT2XConfig()) == "gpt2"
    assert isinstance(to_stock_config(GPT2XConfig()), GPT2Config)
