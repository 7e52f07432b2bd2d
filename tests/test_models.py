"""Models by recipe: made, saved, found and loaded."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gpt2x.config import DataSection, ModelSection, Recipe, RunSection, TrainSection
from gpt2x.errors import UserError
from gpt2x.models import (
    flops_per_token,
    load_for_inference,
    load_weights,
    make_config,
    make_model,
    num_parameters,
    save_model,
)

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
LLAMA = {"position_embedding": "rope", "norm": "rms_norm", "hidden_act": "silu", "gated_mlp": True}
LLAMA |= {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
NO_STOCK_FORM = LLAMA | {"gated_mlp": False}


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({str(number): number for number in range(40)} | {"<eos>": 40}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>", pad_token="<eos>")


def recipe(*, seed=1, init_from=None, **model):
    return Recipe(
        run=RunSection(seed=seed),
        model=ModelSection(**SHAPE | model),
        data=DataSection(path="nowhere", sequence_length=16),
        train=TrainSection(max_steps=1),
        init_from=init_from,
    )


def test_the_vocabulary_and_the_special_tokens_are_the_tokenizers(tokenizer):
    config = make_config(recipe().model, tokenizer)
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id, config.pad_token_id) == (41, 40, 40, 40)


def test_a_vocabulary_given_by_the_recipe_is_kept(tokenizer):
    assert make_config(recipe(vocab_size=64).model, tokenizer).vocab_size == 64


def test_the_weights_are_drawn_from_the_recipes_seed(tokenizer):
    torch.rand(5)
    first = make_model(recipe(seed=3), tokenizer).state_dict()
    torch.rand(7)
    again, other = (make_model(recipe(seed=seed), tokenizer).state_dict() for seed in (3, 4))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_an_architecture_that_contradicts_itself_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"hidden_size \(32\).*num_attention_heads \(3\)"):
        make_model(recipe(num_attention_heads=3), tokenizer)


def test_a_model_to_go_on_from_that_is_not_there_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="nowhere") as refused:
        make_model(recipe(init_from=str(tmp_path / "nowhere")), tokenizer)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("options", "model_type"), [({}, "gpt2"), (LLAMA, "llama"), (NO_STOCK_FORM, "gpt2x")])
def test_a_model_is_saved_in_the_stock_form_where_there_is_one(tokenizer, tmp_path, options, model_type):
    model = make_model(recipe(**options), tokenizer).eval()
    assert save_model(model, tmp_path, tokenizer) == model_type
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    ids = torch.arange(16)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, LLAMA, NO_STOCK_FORM])
def test_saved_weights_come_back_bit_for_bit(tokenizer, tmp_path, options):
    saved = make_model(recipe(seed=1, **options), tokenizer)
    save_model(saved, tmp_path, tokenizer)
    model = make_model(recipe(seed=2, **options), tokenizer)
    tensors = {name: id(parameter) for name, parameter in model.named_parameters()}
    load_weights(model, tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved.state_dict().items())
    assert tensors == {name: id(parameter) for name, parameter in model.named_parameters()}


def test_a_directory_of_something_else_is_refused_in_one_line(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="final") as refused:
        load_for_inference(str(tmp_path / "final"), dtype=torch.float32)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("options", [{}, LLAMA, NO_STOCK_FORM], ids=["gpt2", "llama", "gpt2x"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights, name: weights.pop(name),
            "lacks {name}, which a {kind} model needs; use a complete checkpoint.",
        ),
        (
            lambda weights, name: weights.update({name: torch.ones(3)}),
            "holds {name} of the shape (3,), and by its config it has (32,); use the config.json and the weights of "
            "one model.",
        ),
        (
            lambda weights, name: weights.update({name.replace("weight", "scale"): torch.ones(3)}),
            "holds {scale}, which a {kind} model has no place for; load it by its own class.",
        ),
        (None, "is damaged (Error while deserializing header: header too small); get its files again."),
    ],
    ids=["missing", "another shape", "too many", "damaged"],
)
def test_no_model_of_other_tensors_is_run(tokenizer, tmp_path, options, change, message):
    kind = save_model(make_model(recipe(**options), tokenizer), tmp_path, tokenizer)
    file = tmp_path / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = next(name for name in weights if "1." in name and ("layernorm.weight" in name or "ln_1.weight" in name))
    if change is None:
        file.write_bytes(b"abc")
    else:
        change(weights, name)
        save_file(weights, file, metadata={"format": "pt"})
    expected = message.format(name=name, kind=kind, scale=name.replace("weight", "scale"))
    with pytest.raises(UserError, match=f"^{re.escape(f'{tmp_path} {expected}')}$"):
        load_for_inference(str(tmp_path), dtype=torch.float32)


def test_a_config_of_wrong_types_is_refused_in_one_line(tokenizer, tmp_path):
    save_model(make_model(recipe(), tokenizer), tmp_path, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_embd": "wide"}))
    with pytest.raises(
        UserError, match=r"field 'n_embd'.* expected int, got str .*; mend its config.json.$"
    ) as refused:
        load_for_inference(str(tmp_path), dtype=torch.float32)
    assert "\n" not in str(refused.value)


def test_weights_of_a_checkpoint_that_are_not_whole_are_refused(tokenizer, tmp_path):
    model = make_model(recipe(), tokenizer)
    save_model(model, tmp_path, tokenizer)
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"is damaged \(.*header too small\); get its files again"):
        load_weights(model, tmp_path)


def test_inference_runs_in_the_dtype_asked_for_and_without_dropout(tokenizer, tmp_path):
    save_model(make_model(recipe(hidden_dropout=0.5), tokenizer), tmp_path, tokenizer)
    model = load_for_inference(str(tmp_path), dtype=torch.bfloat16)
    assert (model.dtype, model.training) == (torch.bfloat16, False)


def test_the_parameters_in_matrix_products_leave_out_what_is_only_looked_up(tokenizer):
    C, V, T = 32, 41, 16
    layers = 2 * (4 * C * C + 4 * C + 8 * C * C + 5 * C + 4 * C) + 2 * C
    assert num_parameters(make_model(recipe(), tokenizer)) == (layers + V * C + T * C, layers + V * C)
    untied = num_parameters(make_model(recipe(tie_word_embeddings=False), tokenizer))
    assert untied == (layers + 2 * V * C + T * C, layers + V * C)


def test_the_parameters_of_a_stock_model_are_counted_alike():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=32, n_layer=2, n_head=2, n_positions=16))
    assert num_parameters(model)[1] == sum(p.numel() for p in model.parameters()) - 16 * 32


def test_weights_of_another_shape_are_refused_in_one_line(tokenizer, tmp_path):
    save_model(make_model(recipe(), tokenizer), tmp_path, tokenizer)
    with pytest.raises(
        UserError, match=r"^the weights of .* do not fit the model of init_from and the data's tokenizer"
    ):
        load_weights(make_model(recipe(hidden_size=16), tokenizer), tmp_path)


def test_adapters_are_no_model_to_start_from(tokenizer, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^init_from .* holds adapters, not a model; make it one by lora.merge true"):
        make_model(recipe(init_from=str(tmp_path)), tokenizer)


def test_the_flops_of_a_token_are_palms_without_the_masked_half(monkeypatch):
    config = SimpleNamespace(num_hidden_layers=3, num_attention_heads=5, head_dim=7)
    monkeypatch.setattr("gpt2x.models.num_parameters", lambda model: (1000, 900))
    weights = [torch.nn.Parameter(torch.empty(500), requires_grad=False), torch.nn.Parameter(torch.empty(500))]
    model = SimpleNamespace(config=config, parameters=lambda: weights)
    attention = 12 * 3 * 5 * 7 * 16 / 2
    assert flops_per_token(model, 16) == 4 * 900 + 2 * 500 + attention  # half of the weights are frozen
    weights[0].requires_grad = True
    assert flops_per_token(model, 16) == 6 * 900 + attention
