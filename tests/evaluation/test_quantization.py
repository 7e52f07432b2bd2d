"""int8 linear layers: near to what they replace, and a quarter of its size."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2x.errors import UserError
from gpt2x.evaluation.quantization import Int8Linear, num_bytes, quantize_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_the_product_of_the_rounded_values(dtype):
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 7), torch.randn(2, 3, 24).to(dtype)
    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
    steps_w, steps_x = weight.abs().amax(1) / 127, x.double().abs().amax(-1, keepdim=True) / 127
    rounded_w, rounded_x = (weight / steps_w[:, None]).round(), (x.double() / steps_x).round()
    expected = torch.einsum("btk,nk->btn", rounded_x * steps_x, rounded_w * steps_w[:, None]) + bias
    found = Int8Linear(linear.weight, linear.bias)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-5 if dtype == torch.float32 else 1e-2)


def test_a_row_of_zeros_stays_zero():
    layer = Int8Linear(torch.ones(3, 8), None)
    assert torch.equal(layer(torch.zeros(2, 8)), torch.zeros(2, 3))


def test_a_quantized_model_is_near_to_the_model_and_smaller(model):
    ids = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model.eval()(ids, use_cache=False).logits
        size, table = num_bytes(model), model.get_input_embeddings().weight.clone()
        after = quantize_int8(model)(ids, use_cache=False).logits
    error = (after - before).norm() / before.norm()
    assert 0 < error < 0.05
    assert not [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert num_bytes(model) < 0.65 * size  # a tied head is no longer shared with the table


def test_gpt2s_transposed_layers_are_quantized_as_well():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        after = quantize_int8(model)(ids, use_cache=False).logits
    assert 0 < (after - before).norm() / before.norm() < 0.05
    assert isinstance(model.transformer.h[0].attn.c_attn, Int8Linear)


def test_a_model_on_another_device_is_refused():
    with torch.device("meta"):
        config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(config)
    with pytest.raises(UserError, match=r"int8 inference runs on the CPU and the model is on meta; move it there."):
        quantize_int8(model)
