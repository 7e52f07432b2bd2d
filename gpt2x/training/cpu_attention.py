"""Causal attention for training on a CPU: plain matrix products over chunks of queries.

torch's flash kernel for the CPU recomputes the scores in its backward pass, in small tiles. At the lengths that are
trained on a CPU the probabilities fit in memory, and large batched products are faster, the more so the shorter the
sequence (``scripts/benchmark.py attention``). Keys that a chunk's queries cannot see are never multiplied.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "chunked_causal"
_CHUNK = 128


def register_chunked_causal() -> str:
    """Makes the attention known to transformers; returns the name for ``model.set_attn_implementation``."""
    AttentionInterface.register(NAME, chunked_causal_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def chunked_causal_attention(
    module: nn.Module,
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface; whatever is not plain causal training goes to SDPA.

    Returns:
        The output (B, T, H, D), and None for the weights.
    """
    is_plain = attention_mask is None and dropout == 0.0 and q_BHTD.shape == k_BKSD.shape
    if not (is_plain and torch.is_grad_enabled()):
        return sdpa_attention_forward(
            module, q_BHTD, k_BKSD, v_BKSD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    B, H, T, D = q_BHTD.shape
    scale = D**-0.5 if scaling is None else scaling
    q_NTD, k_NTD, v_NTD = (x_BHTD.reshape(B * H, T, D) for x_BHTD in (q_BHTD, k_BKSD, v_BKSD))
    out_NTD = _ChunkedCausal.apply(q_NTD, k_NTD, v_NTD, scale)
    return out_NTD.view(B, H, T, D).transpose(1, 2), None


class _ChunkedCausal(torch.autograd.Function):
    """softmax(q k^T scale + causal mask) v for (N, T, D), with N = batch x heads."""

    @staticmethod
    def forward(ctx: Any, q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor, scale: float) -> Tensor:
        T = q_NTD.shape[1]
        hidden = torch.full((_CHUNK, _CHUNK), float("-inf"), dtype=q_NTD.dtype).triu_(1)
        out_NTD = torch.empty_like(v_NTD)
        probabilities = []
        for start in range(0, T, _CHUNK):
            stop = min(start + _CHUNK, T)
            scores_NCS = torch.bmm(q_NTD[:, start:stop], k_NTD[:, :stop].mT).mul_(scale)
            scores_NCS[:, :, start:].add_(hidden[: stop - start, : stop - start])
            p_NCS = torch.softmax(scores_NCS, dim=-1)
            out_NTD[:, start:stop] = torch.bmm(p_NCS, v_NTD[:, :stop])
            probabilities.append(p_NCS)
        ctx.save_for_backward(q_NTD, k_NTD, v_NTD, *probabilities)
        ctx.scale = scale
        return out_NTD

    @staticmethod
    def backward(ctx: Any, grad_NTD: Tensor) -> tuple[Tensor | None, ...]:
        q_NTD, k_NTD, v_NTD, *probabilities = ctx.saved_tensors
        grad_NTD = grad_NTD.contiguous()
        dq_NTD, dk_NTD, dv_NTD = torch.empty_like(q_NTD), torch.zeros_like(k_NTD), torch.zeros_like(v_NTD)
        for number, p_NCS in enumerate(probabilities):
            start, stop = number * _CHUNK, number * _CHUNK + p_NCS.shape[1]
            grad_NCD = grad_NTD[:, start:stop]
            dp_NCS = torch.bmm(grad_NCD, v_NTD[:, :stop].mT)
            ds_NCS = torch._softmax_backward_data(dp_NCS, p_NCS, -1, p_NCS.dtype).mul_(ctx.scale)
            dv_NTD[:, :stop] += torch.bmm(p_NCS.mT, grad_NCD)
            dk_NTD[:, :stop] += torch.bmm(ds_NCS.mT, q_NTD[:, start:stop])
            dq_NTD[:, start:stop] = torch.bmm(ds_NCS, k_NTD[:, :stop])
        return dq_NTD, dk_NTD, dv_NTD, None
