"""Attention under autocast, on the CPU with the two rules of CUDA's that the CPU's has not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stock_models import MODERN, random_tokens, small_config
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_gpt2x import GPT2XForCausalLM

FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "layer norms with RoPE": {"position_embedding": "rope"},
    "norms of queries and keys with weights": MODERN,
    "norms of queries and keys without": {**MODERN, "qk_norm": "weightless", "norm": "rms_norm_weightless"},
}
NORMS = ("rms_norm", "layer_norm")


@pytest.mark.parametrize("norm", NORMS)
def test_cuda_normalizes_in_float32_under_autocast(norm: str) -> None:
    """The rule that the next test lends to the CPU; torch applies it to fake tensors of a GPU that is not there."""
    dtype = torch.get_autocast_dtype("cuda")
    with FakeTensorMode():
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            x = torch.empty(2, 4, dtype=torch.bfloat16, device="cuda:0")
            assert getattr(F, norm)(x, (4,)).dtype == torch.float32
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_queries_keys_and_values_are_of_the_dtype_of_autocast(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, form: str
) -> None:
    for norm in NORMS:
        original = getattr(F, norm)
        monkeypatch.setattr(F, norm, lambda *arguments, original=original: original(*arguments).float())
    found: list[set[torch.dtype]] = []

    def attend(module: Any, *tensors: Any, **options: Any) -> tuple[torch.Tensor, None]:
        found.append({tensor.dtype for tensor in tensors[:3]})
        return sdpa_attention_forward(module, *tensors, **options)

    AttentionInterface.register("dtypes", attend)
    model = GPT2XForCausalLM(small_config(**FORMS[form]))
    model.set_attn_implementation("dtypes")
    with torch.autocast("cpu", dtype):
        model(random_tokens(2, 5), use_cache=False)
    assert found == [{dtype}] * 2
