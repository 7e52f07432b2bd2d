"""LoRA adapters in the layers of the stock classes, whose own weights stay as they are."""

import sys
from pathlib import Path

import pytest
import torch
from adapted_models import (
    EVERYWHERE,
    STOCK,
    VOCAB_SIZE,
    adapted,
    adapted_layers,
    disturb,
    make_tokenizer,
    recipe,
    save_stock,
    tokens,
    train_steps,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gpt2x.adapters import adapter_weights, add_adapters, load_base, save_merged
from gpt2x.config import LoraSection, OptimizerSection
from gpt2x.errors import UserError
from gpt2x.evaluation.samples import sample_texts
from gpt2x.training.cpu_attention import register_chunked_causal
from gpt2x.training.optimizers import make_optimizers

DEFAULT_TARGETS = {
    "gpt2": {"c_attn"},
    "llama": {"q_proj", "v_proj"},
    "qwen3": {"q_proj", "v_proj"},
    "nanochat": {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"},
}
ALL_LINEAR = {
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "nanochat": DEFAULT_TARGETS["nanochat"],
}


def test_training_leaves_every_bit_of_the_base_as_it_was(stock_dir: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(stock_dir, dtype=torch.float32).state_dict()
    model = adapted(stock_dir)
    untrained = {name: tensor.clone() for name, tensor in adapter_weights(model).items()}
    train_steps(model, make_optimizers(model, OptimizerSection(learning_rate=1e-2)), range(5))
    assert all(not torch.equal(tensor, untrained[name]) for name, tensor in adapter_weights(model).items())
    after = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if ".lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_new_adapters_change_nothing(stock_dir: Path) -> None:
    base, ids = AutoModelForCausalLM.from_pretrained(stock_dir, dtype=torch.float32).eval(), tokens()
    with torch.no_grad():
        assert torch.equal(adapted(stock_dir).eval()(ids).logits, base(ids).logits)


def test_the_loss_is_the_sum_over_the_predicted_tokens_divided_by_the_given_number(stock_dir: Path) -> None:
    model, ids = disturb(adapted(stock_dir)), tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    outputs = model(
        input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(7.0), return_logits=False, use_cache=False
    )
    logits = model(ids).logits[:, :-1].reshape(-1, VOCAB_SIZE)
    expected = F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / 7
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "chunked_causal"])
def test_packed_documents_do_not_see_each_other(stock_dir: Path, attention: str) -> None:
    model = disturb(adapted(stock_dir)).train()  # the chunked attention is for training
    model.set_attn_implementation(register_chunked_causal() if attention == "chunked_causal" else attention)
    first, second, other = tokens(1, 9, seed=1), tokens(1, 14, seed=2), tokens(1, 23, seed=3)
    packed = torch.cat([torch.cat([first, second], 1), other])
    position_ids = torch.stack([torch.cat([torch.arange(9), torch.arange(14)]), torch.arange(23)])
    together = model(
        input_ids=packed, labels=packed, position_ids=position_ids, return_logits=False, use_cache=False
    ).logits
    alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in (first, second)], 1)
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1:], model(input_ids=other, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_gives_the_adapters_the_same_gradients(stock_dir: Path) -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model, ids = disturb(adapted(stock_dir)).train(), tokens()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, checkpointed)


def test_the_adapters_are_drawn_from_the_seed_and_nothing_else_is(tmp_path: Path) -> None:
    directory = save_stock("llama", tmp_path)
    torch.manual_seed(1)
    first = adapter_weights(adapted(directory, seed=3))
    state = torch.get_rng_state()
    again, other = (adapter_weights(adapted(directory, seed=seed)) for seed in (3, 4))
    name = next(name for name in first if ".lora_A." in name)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_adapters_are_optimized_and_all_of_them_are_decayed(stock_dir: Path) -> None:
    model = adapted(stock_dir)
    (optimizer,) = make_optimizers(model, OptimizerSection(weight_decay=0.1))
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.1
    own = {tensor.data_ptr() for tensor in adapter_weights(model).values()}
    assert {parameter.data_ptr() for parameter in group["params"]} == own


def test_a_model_with_adapters_writes_what_the_merged_one_does(
    stock_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = disturb(adapted(stock_dir))
    save_merged(model, tmp_path / "merged", tokenizer)
    merged, prompts = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ["5 6 7", "8 9", "30"]
    texts, expected = (sample_texts(each, tokenizer, prompts, max_new_tokens=5, seed=1) for each in (model, merged))
    assert texts == expected
    assert any(texts)


@pytest.mark.parametrize("name", STOCK)
def test_without_targets_they_are_pefts_choice_or_else_all_linear_layers(name: str, tmp_path: Path) -> None:
    model = adapted(save_stock(name, tmp_path), LoraSection(rank=2))
    assert adapted_layers(model) == DEFAULT_TARGETS[name]


@pytest.mark.parametrize("name", ALL_LINEAR)
def test_all_linear_is_every_matrix_but_the_head(name: str, tmp_path: Path) -> None:
    assert adapted_layers(adapted(save_stock(name, tmp_path))) == ALL_LINEAR[name]


def test_a_head_of_its_own_may_be_a_target(tmp_path: Path) -> None:
    section = LoraSection(rank=2, target_modules=["lm_head", "q_proj"])
    assert adapted_layers(adapted(save_stock("llama", tmp_path), section)) == {"lm_head", "q_proj"}


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_a_head_that_is_the_embeddings_too_is_refused(name: str, tmp_path: Path) -> None:
    directory = save_stock(name, tmp_path)
    with pytest.raises(UserError, match=r"lora.target_modules \(lm_head\) must not have the head where it is tied"):
        adapted(directory, LoraSection(target_modules=["lm_head"]))


@pytest.mark.parametrize("wrong", ["q_porj", "embed_tokens", "norm", "layers.0"])
def test_a_target_that_is_no_linear_layer_is_refused(wrong: str, tmp_path: Path) -> None:
    directory = save_stock("nanochat", tmp_path)
    message = rf"lora.target_modules \({wrong}\) must be linear layers of .*: choose from fc1, fc2, k_proj, .*v_proj"
    with pytest.raises(UserError, match=message):
        adapted(directory, LoraSection(target_modules=["q_proj", wrong]))


def test_rank_scale_and_dropout_are_the_recipes(tmp_path: Path) -> None:
    model = adapted(save_stock("gpt2", tmp_path), LoraSection(rank=3, alpha=12.0, dropout=0.25))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 12.0, 0.25)
    layer = model.get_base_model().transformer.h[0].attn.c_attn
    assert (layer.lora_A["default"].weight.shape, layer.scaling["default"]) == ((3, 32), 4.0)
    assert layer.lora_dropout["default"].p == 0.25


def test_without_peft_the_remedy_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(recipe(save_stock("gpt2", tmp_path)), make_tokenizer(VOCAB_SIZE))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError, match=r"lora needs peft, which is not installed; run `.* -m pip install -e .*\[peft\]'`\."
    ):
        add_adapters(base, EVERYWHERE, seed=1)
