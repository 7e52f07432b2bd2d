"""GPT2X computes what the stock classes compute: logits and gradients."""

import pytest
import torch
from stock_models import GPT2_SIZES, STOCK_MODELS, gpt2, gpt2x_like, llama, random_tokens, relative_error
from transformers import PreTrainedModel

from gpt2x import to_stock_state_dict
from modeling_gpt2x import GPT2XForCausalLM

TOLERANCE = 1e-5


def assert_same_logits_and_gradients(
    model: GPT2XForCausalLM, stock: PreTrainedModel, input_ids: torch.Tensor, **inputs: torch.Tensor
) -> None:
    mask = inputs.get("attention_mask", torch.ones_like(input_ids)).bool()
    # What stands at padding is nobody's business: neither predicted, nor predicting the first token behind it.
    labels = input_ids.masked_fill(~(mask & torch.nn.functional.pad(mask[:, :-1], (1, 0), value=True)), -100)
    expected = stock(input_ids, labels=labels, use_cache=False, **inputs)
    actual = model(input_ids, labels=labels, use_cache=False, **inputs)
    assert relative_error(actual.logits[mask], expected.logits[mask]) < TOLERANCE
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=TOLERANCE)
    expected.loss.backward()
    actual.loss.backward()
    gradients = to_stock_state_dict({name: p.grad for name, p in model.named_parameters()}, model.config)
    for name, parameter in stock.named_parameters():
        error = (gradients[name] - parameter.grad).norm()
        # Where a gradient is zero but for rounding (the bias of the keys), compare with the weight's size instead.
        assert error < TOLERANCE * max(parameter.grad.norm(), 1e-2 * parameter.norm()), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", STOCK_MODELS)
def test_logits_and_gradients_equal_the_stock_class(name: str, attention: str) -> None:
    stock = STOCK_MODELS[name]()
    stock.set_attn_implementation(attention)
    assert_same_logits_and_gradients(gpt2x_like(stock), stock, random_tokens(2, 24))


@pytest.mark.parametrize(
    "size",
    ["gpt2", "gpt2-medium", *(pytest.param(size, marks=pytest.mark.trial) for size in ("gpt2-large", "gpt2-xl"))],
)
def test_each_gpt2_width_equals_gpt2(size: str) -> None:
    width, heads = GPT2_SIZES[size]
    stock = gpt2(width, heads)
    assert_same_logits_and_gradients(gpt2x_like(stock), stock, random_tokens(1, 16))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3 with sliding layers", "nanochat"])
def test_padding_masks_on_either_side_equal_the_stock_class(name: str, attention: str) -> None:
    stock = STOCK_MODELS[name]()
    stock.set_attn_implementation(attention)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, 12:] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    model = gpt2x_like(stock)
    assert_same_logits_and_gradients(
        model, stock, random_tokens(2, 16), attention_mask=mask, position_ids=position_ids
    )


def test_hidden_states_and_attentions_equal_the_stock_class() -> None:
    stock = llama()
    stock.set_attn_implementation("eager")
    model, tokens = gpt2x_like(stock), random_tokens(1, 8)
    expected = stock(tokens, output_hidden_states=True, output_attentions=True)
    actual = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 3
    for a, b in zip(actual.hidden_states + actual.attentions, expected.hidden_states + expected.attentions):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_dropout_is_applied_in_training_only() -> None:
    stock = gpt2(embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5)
    model, tokens = gpt2x_like(stock), random_tokens(1, 8)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_logits_to_keep_computes_the_last_positions_only() -> None:
    model, tokens = gpt2x_like(gpt2()), random_tokens(2, 8)
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, model(tokens).logits[:, -3:])


# transformers 5.23 renamed the method; 5.17 knows the old name only.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_gives_equal_gradients() -> None:
    model, tokens = gpt2x_like(llama()).train(), random_tokens(2, 12)
    model(tokens, labels=tokens).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(tokens, labels=tokens).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_more_tokens_than_learned_positions_are_refused() -> None:
    model = gpt2x_like(gpt2(n_positions=8))
    with pytest.raises(ValueError, match=r"9 tokens but max_position_embeddings is 8; shorten it"):
        model(random_tokens(1, 9))


def test_tokens_and_embeddings_together_are_refused() -> None:
    model, tokens = gpt2x_like(gpt2()), random_tokens(1, 4)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens, inputs_embeds=model.get_input_embeddings()(tokens))


def test_embeddings_in_place_of_tokens_give_the_same_logits() -> None:
    model, tokens = gpt2x_like(gpt2()), random_tokens(1, 4)
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)


@pytest.mark.trial
def test_the_whole_124m_equals_gpt2() -> None:
    stock = gpt2(768, 12, n_layer=12, n_positions=1024, vocab_size=50257, bos_token_id=50256, eos_token_id=50256)
    model = gpt2x_like(stock)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert_same_logits_and_gradients(model, stock, random_tokens(1, 256, 50257))
