"""Sequence and token classification on GPT2X: the stock classes' numbers, saved and found by the Auto classes."""

import json
from pathlib import Path

import pytest
import torch
from stock_models import SIZES, VOCAB_SIZE, gpt2, llama, perturbed, random_tokens, small_config
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
)

from gpt2x import from_stock_config
from modeling_gpt2x import GPT2XForCausalLM, GPT2XForSequenceClassification, GPT2XForTokenClassification

AUTO_CLASSES = {
    GPT2XForSequenceClassification: AutoModelForSequenceClassification,
    GPT2XForTokenClassification: AutoModelForTokenClassification,
}


def pair(own_class: type, stock_class: type) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same classifier by GPT2X and by Llama."""
    stock = perturbed(stock_class(LlamaConfig(**{**SIZES, "pad_token_id": 0, "num_labels": 3})))
    config = from_stock_config(stock.config)
    config.num_labels = 3
    model = own_class(config)
    model.load_state_dict(stock.state_dict())
    return model.eval(), stock


@pytest.mark.parametrize("padding", ["left", "right"])
def test_sequence_classification_equals_llamas(padding: str) -> None:
    model, stock = pair(GPT2XForSequenceClassification, LlamaForSequenceClassification)
    tokens, labels = random_tokens(2, 9), torch.tensor([2, 0])
    padded = slice(0, 3) if padding == "left" else slice(6, 9)
    tokens[0, padded] = 0
    inputs = {"attention_mask": (tokens != 0).long(), "labels": labels}
    actual, expected = model(tokens, **inputs), stock(tokens, **inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    actual.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(model.score.weight.grad, stock.score.weight.grad, rtol=1e-4, atol=1e-6)


def test_token_classification_equals_llamas() -> None:
    model, stock = pair(GPT2XForTokenClassification, LlamaForTokenClassification)
    tokens, labels = random_tokens(2, 9), torch.randint(0, 3, (2, 9))
    actual, expected = model(tokens, labels=labels), stock(tokens, labels=labels)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("own_class", AUTO_CLASSES)
def test_a_saved_classifier_is_found_by_its_auto_class(own_class: type, tmp_path: Path) -> None:
    model, tokens = own_class(small_config(num_labels=3, pad_token_id=0)).eval(), random_tokens(2, 6)
    model.save_pretrained(tmp_path)
    loaded, loading = AUTO_CLASSES[own_class].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is own_class
    assert not any(loading.values())
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    names = ("Config", "Model", "ModelForCausalLM", "ModelForSequenceClassification", "ModelForTokenClassification")
    assert list(auto_map) == [f"Auto{name}" for name in names]


@pytest.mark.parametrize("own_class", AUTO_CLASSES)
def test_a_language_model_continues_as_a_classifier(own_class: type, tmp_path: Path) -> None:
    for make in (gpt2, llama):
        stock, tokens = make(), random_tokens(1, 6)
        stock.save_pretrained(tmp_path / make.__name__)
        model, loading = own_class.from_pretrained(
            tmp_path / make.__name__, num_labels=5, pad_token_id=0, output_loading_info=True
        )
        assert {name.split(".")[0] for name in loading["missing_keys"]} == {"score"}
        assert model.score.weight.shape[0] == 5
        hidden = model.model(tokens).last_hidden_state
        torch.testing.assert_close(hidden, stock.base_model(tokens).last_hidden_state, rtol=1e-5, atol=1e-5)
        assert model(tokens).logits.shape[-1] == 5


def test_a_trained_score_of_a_stock_classifier_is_never_lost_silently(tmp_path: Path) -> None:
    _, stock = pair(GPT2XForSequenceClassification, LlamaForSequenceClassification)
    stock.save_pretrained(tmp_path)
    for own_class in (GPT2XForSequenceClassification, GPT2XForCausalLM):
        with pytest.raises(ValueError, match=r"holds score\.weight, which a llama model has no place for; load it by"):
            own_class.from_pretrained(tmp_path)


def test_the_sizes_of_the_scores_follow_the_config() -> None:
    config = small_config(num_labels=4, pad_token_id=0)
    tokens = random_tokens(2, 5, VOCAB_SIZE)
    assert GPT2XForSequenceClassification(config)(tokens).logits.shape == (2, 4)
    assert GPT2XForTokenClassification(config)(tokens).logits.shape == (2, 5, 4)
