"""Packed weights while generating on a CPU: the same results, and nothing left behind."""

import copy

import pytest
import torch
from stock_models import MODERN, gpt2, gpt2x_like, random_tokens, small_config
from torch import nn

from modeling_gpt2x import GPT2XForCausalLM
from modeling_gpt2x.linear_gpt2x import MAX_ROWS, STEPS_BEFORE_PACKING, is_packable, packed_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that get packed."""
    shapes = []
    original = torch.ops.mkldnn._reorder_linear_weight

    def spy(weight: torch.Tensor, rows: int) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return original(weight, rows)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", spy)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, MAX_ROWS])
@torch.no_grad()
def test_packed_products_equal_plain_ones(rows: int, bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(96, 211, bias=bias, dtype=dtype)
    x = torch.randn(rows, 1, 96, dtype=dtype)
    if not is_packable(linear):
        pytest.skip("this CPU has no bfloat16 products in oneDNN")
    expected = linear(x)
    with packed_linears(linear):
        for _ in range(STEPS_BEFORE_PACKING + 1):
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(linear(x), expected, rtol=tolerance, atol=tolerance)


def test_generation_packs_every_projection_once_and_leaves_nothing(packings: list) -> None:
    stock = gpt2()
    model, prompt = gpt2x_like(stock), random_tokens(2, 5)
    options = {
        "max_new_tokens": STEPS_BEFORE_PACKING + 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    generated = model.generate(prompt, **options)
    assert len(packings) == 2 * 6 + 1
    assert torch.equal(generated, stock.generate(prompt, **options))
    assert not any("forward" in module.__dict__ for module in model.modules())
    copy.deepcopy(model)


def test_short_texts_and_long_prompts_pack_nothing(packings: list) -> None:
    model = GPT2XForCausalLM(small_config(**MODERN))
    model.generate(random_tokens(4, 40), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert packings == []


def test_new_weights_are_seen_by_the_next_call(packings: list) -> None:
    model, prompt = GPT2XForCausalLM(small_config(**MODERN)), random_tokens(1, 5)
    options = {"max_new_tokens": STEPS_BEFORE_PACKING + 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(prompt, **options)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    generated = model.generate(prompt, **options)
    assert torch.count_nonzero(generated[0, 5:]) == 0  # all logits are equal, so the first token wins
    assert len(packings) > 13


def test_a_failure_leaves_nothing_behind() -> None:
    model = GPT2XForCausalLM(small_config())
    with pytest.raises(KeyboardInterrupt), packed_linears(model):
        raise KeyboardInterrupt
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_is_more_than_a_linear_stays_as_it_is() -> None:
    class Adapted(nn.Linear):
        pass

    hooked = nn.Linear(8, 8)
    hooked.forward = lambda x: x
    assert is_packable(nn.Linear(8, 8))
    assert not is_packable(Adapted(8, 8))
    assert not is_packable(hooked)
    assert not is_packable(nn.Linear(8, 8, dtype=torch.float64))
    assert not is_packable(nn.Linear(8, 8, device="meta"))


def test_gradients_flow_where_the_block_is_entered_by_mistake(packings: list) -> None:
    linear, x = nn.Linear(8, 8), torch.randn(1, 8)
    with packed_linears(linear):
        for _ in range(STEPS_BEFORE_PACKING + 2):
            linear(x).sum().backward()
    assert packings == []
    assert linear.weight.grad is not None
