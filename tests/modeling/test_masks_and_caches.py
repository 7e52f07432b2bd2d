"""What a token may see: packed documents, padding, windows, and the past in a cache."""

from typing import Any

import pytest
import torch
from stock_models import MODERN, STOCK_MODELS, VOCAB_SIZE, gpt2, gpt2x_like, random_tokens, small_config
from transformers import DynamicCache, StaticCache

from modeling_gpt2x import GPT2XForCausalLM

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": MODERN,
    "sliding": {**MODERN, **SLIDING},
}


def build(name: str, attention: str = "sdpa") -> GPT2XForCausalLM:
    model = GPT2XForCausalLM(small_config(**CONFIGS[name]))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def two_documents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Documents of 7 and 9 tokens, packed into one row with restarting positions."""
    a, b = random_tokens(1, 7), random_tokens(1, 9)
    position_ids = torch.cat((torch.arange(7), torch.arange(9))).unsqueeze(0)
    return a, b, torch.cat((a, b), dim=1), position_ids


@pytest.mark.parametrize(
    "inputs", [{}, {"use_cache": True}, {"mask": True}, {"mask": True, "use_cache": True}], ids=str
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_do_not_see_each_other(name: str, attention: str, inputs: dict[str, bool]) -> None:
    model = build(name, attention)
    a, b, packed, position_ids = two_documents()
    mask = torch.ones_like(packed) if inputs.get("mask") else None
    use_cache = inputs.get("use_cache", False)
    logits = model(packed, attention_mask=mask, position_ids=position_ids, use_cache=use_cache).logits
    alone = torch.cat((model(a).logits, model(b).logits), dim=1)
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_have_exactly_zero_gradient_across(attention: str) -> None:
    model = build("modern", attention)
    _, _, packed, position_ids = two_documents()
    embeds = model.get_input_embeddings()(packed).detach().requires_grad_()
    model(inputs_embeds=embeds, position_ids=position_ids).logits[:, 7:].sum().backward()
    assert torch.count_nonzero(embeds.grad[:, :7]) == 0
    assert torch.count_nonzero(embeds.grad[:, 7:]) > 0


def test_the_loss_of_packed_documents_is_the_mean_over_their_tokens() -> None:
    model = build("modern")
    a, b, packed, position_ids = two_documents()
    labels = packed.clone()
    labels[:, 7] = -100  # the first token of the second document is nobody's next token
    loss = model(packed, position_ids=position_ids, labels=labels, return_logits=False).loss
    alone = (6 * model(a, labels=a).loss + 8 * model(b, labels=b).loss) / 14
    torch.testing.assert_close(loss, alone)


def test_the_mask_of_packed_documents_compiles_into_one_graph() -> None:
    model = build("modern")
    _, _, packed, position_ids = two_documents()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(packed, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(compiled(packed, position_ids=position_ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_plain_batches_reach_sdpa_without_a_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        masks.append((attn_mask, kwargs["is_causal"]))
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, tokens = build(name), random_tokens(2, 8)
    torch.compile(model, fullgraph=True, backend="eager")(tokens, labels=tokens)
    model(tokens, labels=tokens)
    assert masks == [(None, True)] * len(masks)
    assert masks


def test_a_sliding_layer_sees_its_window_only() -> None:
    model = GPT2XForCausalLM(small_config(**MODERN, layer_types=["sliding_attention"] * 2, sliding_window=3)).eval()
    embeds = model.get_input_embeddings()(random_tokens(1, 12)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, 11].sum().backward()
    seen = embeds.grad[0].abs().sum(-1) > 0
    assert seen.tolist() == [False] * 7 + [True] * 5  # two layers of window 3 reach 4 tokens back


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = build("gpt2"), random_tokens(1, 10)
    changed = tokens.clone()
    changed[:, 6:] = random_tokens(1, 4)
    assert torch.equal(model(tokens).logits[:, :6], model(changed).logits[:, :6])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "qwen3 with sliding layers", "nanochat"])
def test_decoding_with_a_cache_equals_the_full_forward_of_the_stock_class(name: str, kind: str) -> None:
    stock = STOCK_MODELS[name]()
    model, tokens = gpt2x_like(stock), random_tokens(2, 14)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=16)
    pieces = tokens.split([6, 1, 1, 4, 1, 1], dim=1)
    with torch.no_grad():
        logits = torch.cat([model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], dim=1)
        torch.testing.assert_close(logits, stock(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_is_the_same_with_and_without_cache(name: str) -> None:
    model, prompt = build(name), random_tokens(1, 6)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    assert torch.equal(cached, model.generate(prompt, cache_implementation="static", **options))
    assert cached.shape == (1, 18)


@pytest.mark.parametrize("name", CONFIGS)
def test_batched_left_padded_generation_equals_one_prompt_at_a_time(name: str) -> None:
    model = build(name)
    prompts = [random_tokens(1, 4), random_tokens(1, 7)]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [model.generate(prompt, **options)[0, -8:] for prompt in prompts]
    batch = torch.cat((torch.cat((torch.zeros(1, 3, dtype=torch.long), prompts[0]), dim=1), prompts[1]))
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    for use_cache in (True, False):
        together = model.generate(batch, attention_mask=mask, use_cache=use_cache, **options)[:, -8:]
        assert torch.equal(together, torch.stack(alone))


def test_generation_equals_gpt2s() -> None:
    stock = gpt2()
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = random_tokens(1, 5)
    assert torch.equal(gpt2x_like(stock).generate(prompt, **options), stock.generate(prompt, **options))


def test_no_cache_is_made_where_there_are_labels() -> None:
    model, tokens = build("gpt2"), random_tokens(1, 5)
    assert model(tokens, labels=tokens).past_key_values is None
    assert model(tokens).past_key_values.get_seq_length() == 5
    assert model(tokens).logits.shape == (1, 5, VOCAB_SIZE)
