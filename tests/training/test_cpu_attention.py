"""Chunked causal attention against torch's own, and where it stands aside."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gpt2x.training import cpu_attention
from gpt2x.training.cpu_attention import chunked_causal_attention, register_chunked_causal
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM


class Attention(torch.nn.Module):
    """What SDPA's interface looks at."""

    is_causal = True
    num_key_value_groups = 1


def inputs(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, 3, length, 8, generator=generator, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("length", [1, 100, 128, 129, 300])
def test_output_and_gradients_equal_sdpa_at_any_length(length: int) -> None:
    expected_inputs, actual_inputs = inputs(length), inputs(length)
    expected = scaled_dot_product_attention(*expected_inputs, is_causal=True, scale=0.3).transpose(1, 2)
    actual, weights = chunked_causal_attention(Attention(), *actual_inputs, None, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    expected.backward(upstream)
    actual.backward(upstream)
    for ours, theirs in zip(actual_inputs, expected_inputs, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_a_later_token_changes_no_earlier_output() -> None:
    q, k, v = inputs(200)
    before, _ = chunked_causal_attention(Attention(), q, k, v, None)
    with torch.no_grad():
        k[:, :, 150:], v[:, :, 150:] = 7.0, 7.0
    after, _ = chunked_causal_attention(Attention(), q, k, v, None)
    assert torch.equal(before[:, :150], after[:, :150])
    assert not torch.equal(before[:, 150:], after[:, 150:])


def chunks_run(monkeypatch: pytest.MonkeyPatch, *arguments: object, **options: object) -> int:
    """How often the chunked function itself was entered."""
    entered = []
    original = cpu_attention._ChunkedCausal.forward
    monkeypatch.setattr(
        cpu_attention._ChunkedCausal, "forward", staticmethod(lambda *a: entered.append(1) or original(*a))
    )
    chunked_causal_attention(Attention(), *arguments, **options)
    return len(entered)


def test_plain_training_is_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunks_run(monkeypatch, *inputs(5), None) == 1


def test_masks_dropout_and_caches_are_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(5)
    assert chunks_run(monkeypatch, q, k, v, torch.ones(2, 1, 5, 5, dtype=torch.bool)) == 0
    assert chunks_run(monkeypatch, q, k, v, None, dropout=0.5) == 0
    assert chunks_run(monkeypatch, q[:, :, :1], k, v, None) == 0


def test_no_probabilities_are_kept_where_no_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert chunks_run(monkeypatch, *inputs(5), None) == 0


def test_a_model_trains_and_generates_the_same_with_it() -> None:
    torch.manual_seed(0)
    model = GPT2XForCausalLM(
        GPT2XConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, eos_token_id=None)
    ).eval()
    ids = torch.randint(0, 50, (2, 40))
    prompt = {"input_ids": ids[:, :5], "attention_mask": torch.ones_like(ids[:, :5])}
    expected = model(input_ids=ids, labels=ids).loss
    expected_text = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    model.set_attn_implementation(register_chunked_causal())
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), expected_text)
