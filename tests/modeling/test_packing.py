"""Documents packed into one row stay alone: on every attention, with masks, caches and padding."""

from typing import Any

import pytest
import torch
from stock_models import MODERN, random_tokens, small_config
from transformers import Cache, DynamicCache, StaticCache

from gpt2x.training.cpu_attention import register_chunked_causal
from modeling_gpt2x import GPT2XForCausalLM
from modeling_gpt2x.context_gpt2x import document_starts

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": MODERN,
    "sliding": {**MODERN, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
}
LENGTHS = (7, 3, 6)
TOLERANCE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}


def build(name: str, attention: str = "sdpa") -> GPT2XForCausalLM:
    torch.manual_seed(1)
    model = GPT2XForCausalLM(small_config(**CONFIGS[name]))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def pack(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and restarting positions of documents in one row."""
    return random_tokens(1, sum(lengths)), torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


def alone(model: GPT2XForCausalLM, packed: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The logits of every document in a forward pass of its own."""
    return torch.cat([model(document, use_cache=False).logits for document in packed.split(lengths, dim=1)], dim=1)


def make_cache(kind: str, model: GPT2XForCausalLM) -> Cache | None:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(model.config, max_cache_len=24) if kind == "static" else None


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_each_document_alone(name: str, attention: str, with_mask: bool, kind: str) -> None:
    model, (packed, position_ids) = build(name, attention), pack(*LENGTHS)
    mask = torch.ones_like(packed) if with_mask else None
    with torch.no_grad():
        logits = model(
            packed, attention_mask=mask, position_ids=position_ids, past_key_values=make_cache(kind, model)
        ).logits
        torch.testing.assert_close(logits, alone(model, packed, LENGTHS), **TOLERANCE)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_documents_stay_apart_over_several_passes_with_a_cache(name: str, kind: str, with_mask: bool) -> None:
    model, (packed, position_ids) = build(name), pack(*LENGTHS)
    cache, logits, start = make_cache(kind, model), [], 0
    with torch.no_grad():
        for size in (4, 5, 1, 1, 4, 1):  # cuts inside documents; the last steps decode token by token
            piece = slice(start, start := start + size)
            mask = torch.ones(1, start, dtype=torch.long) if with_mask else None
            inputs = {"attention_mask": mask, "position_ids": position_ids[:, piece], "past_key_values": cache}
            logits.append(model(packed[:, piece], **inputs).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), alone(model, packed, LENGTHS), **TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_all_rows_of_a_batch_may_be_packed_differently(attention: str) -> None:
    model, rows = build("modern", attention), [(16,), (7, 9), (1, 1, 14)]
    tokens, positions = zip(*(pack(*row) for row in rows))
    with torch.no_grad():
        logits = model(torch.cat(tokens), position_ids=torch.cat(positions)).logits
        expected = torch.cat([alone(model, packed, row) for packed, row in zip(tokens, rows)])
    torch.testing.assert_close(logits, expected, **TOLERANCE)


# Uncompiled, as the compiled kernel takes a minute to build; the trial below does that.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:_compile flag")
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_flex_attention_keeps_documents_apart(name: str, with_mask: bool) -> None:
    model, (packed, position_ids) = build(name, "flex_attention"), pack(*LENGTHS)
    mask = torch.ones_like(packed) if with_mask else None
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = model(packed, attention_mask=mask, position_ids=position_ids).logits
        torch.testing.assert_close(logits, alone(build(name, "eager"), packed, LENGTHS), **TOLERANCE)


@pytest.mark.trial
@pytest.mark.filterwarnings("ignore:_compile flag")
def test_compiled_flex_attention_keeps_documents_apart() -> None:
    model, (packed, position_ids) = build("modern", "flex_attention"), pack(*LENGTHS)
    with torch.no_grad():
        logits = model(packed, attention_mask=torch.ones_like(packed), position_ids=position_ids).logits
        torch.testing.assert_close(logits, alone(build("modern", "eager"), packed, LENGTHS), **TOLERANCE)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "chunked_causal"])
def test_no_gradient_crosses_from_one_document_to_another(attention: str, with_mask: bool) -> None:
    register_chunked_causal()
    model, (packed, position_ids) = build("modern", attention), pack(*LENGTHS)
    embeds = model.get_input_embeddings()(packed).detach().requires_grad_()
    mask = torch.ones_like(packed) if with_mask else None
    labels = packed.clone()
    labels[:, :8] = -100
    labels[:, 10:] = -100
    model(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, labels=labels).loss.backward()
    assert torch.count_nonzero(embeds.grad[:, :7]) == torch.count_nonzero(embeds.grad[:, 10:]) == 0
    assert torch.count_nonzero(embeds.grad[:, 7:9].abs().sum(-1)) == 2


@pytest.mark.parametrize("attention", ["eager", "sdpa", "chunked_causal"])
def test_packed_training_gives_the_gradients_of_the_documents_alone(attention: str) -> None:
    register_chunked_causal()
    model, (packed, position_ids) = build("modern", attention).train(), pack(*LENGTHS)
    labels = packed.clone()
    labels[:, [7, 10]] = -100
    model(packed, position_ids=position_ids, labels=labels, return_logits=False).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for document in packed.split(LENGTHS, dim=1):
        model(document, labels=document, num_items_in_batch=13).loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_mask", [False, True])
def test_packing_compiles_into_one_graph(with_mask: bool) -> None:
    model, (packed, position_ids) = build("sliding"), pack(*LENGTHS)
    mask = torch.ones_like(packed) if with_mask else None
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    logits = compiled(packed, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(logits, alone(model, packed, LENGTHS), **TOLERANCE)


@pytest.mark.parametrize("kind", ["none", "dynamic"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_between_and_around_packed_documents_changes_nothing(name: str, kind: str) -> None:
    model, (packed, position_ids) = build(name), pack(*LENGTHS)
    kept = torch.tensor([2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17, 20, 21])  # padding in front, between, behind
    tokens, positions = torch.zeros(1, 23, dtype=torch.long), torch.ones(1, 23, dtype=torch.long)
    mask = torch.zeros(1, 23, dtype=torch.long)
    tokens[:, kept], positions[:, kept], mask[:, kept] = packed, position_ids, 1
    if name == "sliding":
        model.config.layer_types = ["full_attention"] * 2  # a window counts padding, here as in transformers
    with torch.no_grad():
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": make_cache(kind, model)}
        logits = model(tokens, **inputs).logits[:, kept]
        torch.testing.assert_close(logits, alone(model, packed, LENGTHS), **TOLERANCE)


@pytest.mark.parametrize("counts_padding", [False, True])
def test_padding_within_a_document_does_not_split_it(counts_padding: bool) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0]])
    positions = torch.arange(8)[None] if counts_padding else (mask.cumsum(-1) - 1).clamp(min=0)
    start, _ = document_starts(positions, mask.bool())
    assert start.tolist() == [[0] * 8]


def test_the_starts_of_documents_follow_the_positions() -> None:
    positions = torch.tensor([[3, 4, 5, 0, 1, 0, 7, 8, 2, 2]])
    start, rank = document_starts(positions, torch.ones(1, 10, dtype=torch.bool))
    assert rank.tolist() == [list(range(10))]
    assert start.tolist() == [[0, 0, 0, 3, 3, 5, 6, 6, 8, 9]]
    # Five tokens lie in a cache: the first two continue their document, which began two tokens before.
    start, _ = document_starts(torch.tensor([[2, 3, 0, 1]]), torch.ones(1, 9, dtype=torch.bool))
    assert start.tolist() == [[3, 3, 7, 7]]


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_positions_that_only_count_on_need_no_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        masks.append(attn_mask)
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, tokens = build(name), random_tokens(2, 8)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        model(tokens, attention_mask=torch.ones_like(tokens), position_ids=torch.arange(8)[None])
        model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert masks
    assert all(mask is None for mask in masks)
