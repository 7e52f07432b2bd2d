"""The CPU's attention for training against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from gpt2x.training.cpu_attention import chunked_causal_attention

MODULE = torch.nn.Module()


def inputs(length, *, num_key_heads=3):
    torch.manual_seed(length)
    heads = (3, num_key_heads, num_key_heads)
    return [torch.randn(2, number, length, 8, requires_grad=True) for number in heads]


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300], ids=lambda length: f"T{length}")
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_output_and_gradients_equal_torchs(length, scaling):
    """In less than one chunk of queries, in one, and in several of which the last is short."""
    ours, theirs = inputs(length), inputs(length)
    found, weights = chunked_causal_attention(MODULE, *ours, None, scaling=scaling)
    expected = F.scaled_dot_product_attention(*theirs, is_causal=True, scale=scaling).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad(output, tensors, upstream) for output, tensors in ((found, ours), (expected, theirs))
    ]
    for own, reference in zip(*gradients):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)


def test_no_query_sees_a_later_key():
    q, k, v = inputs(200)
    output, _ = chunked_causal_attention(MODULE, q, k, v, None)
    for tensor in torch.autograd.grad(output[:, 140].sum(), (k, v)):
        assert tensor[:, :, 141:].eq(0).all()
        assert tensor[:, :, 140].ne(0).any()


def test_a_mask_is_obeyed():
    q, k, v = inputs(6)
    mask = torch.eye(6, dtype=torch.bool).expand(2, 1, 6, 6)
    output, _ = chunked_causal_attention(MODULE, q, k, v, mask)
    torch.testing.assert_close(output, v.transpose(1, 2))


def test_dropout_is_obeyed():
    torch.manual_seed(0)
    q, k, v = inputs(6)
    output, _ = chunked_causal_attention(MODULE, q, k, v, None, dropout=0.999999)
    assert output.eq(0).all()
