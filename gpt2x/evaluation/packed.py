"""Evaluation on a CPU with packed weights: the same matrix products by oneDNN, in the layout that its kernels want.

torch's own product reaches 90 to 98 GFLOP/s in float32 on a core of an EPYC 9004, and 60 at the head of GPT-2, whose
50,257 rows are an odd number; packed, both reach 91 to 111. The layout is a second copy of the weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modeling_gpt2x.linear_gpt2x import MAX_PACKED_BYTES, is_packable

# Rows of a typical product, by which oneDNN chooses the layout; it computes any number of rows with it.
_ROWS = 512


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Computes Linear modules (and GPT-2's Conv1D) on the CPU with packed weights; no weight may change meanwhile.

    Results differ from the plain ones by rounding. Quantized, sharded and adapted modules stay as they are; so does a
    model of more than 4 GiB.
    """
    linears: dict[nn.Module, nn.Linear] = {}
    for module in model.modules():
        linear = _as_linear(module)
        if linear is not None:
            linears[module] = linear
    if sum(linear.weight.nbytes for linear in linears.values()) > MAX_PACKED_BYTES:
        linears = {}
    try:
        for module, linear in linears.items():
            module.forward = _packed_forward(linear)
        yield
    finally:
        for module in linears:
            module.__dict__.pop("forward", None)


def _as_linear(module: nn.Module) -> nn.Linear | None:
    """The module as a Linear that oneDNN can compute; Conv1D is one whose weight is stored transposed."""
    if type(module) is nn.Linear:
        return module if is_packable(module) else None
    if type(module) is not Conv1D or "forward" in module.__dict__ or type(module.weight) is not nn.Parameter:
        return None
    weight_NK, bias = cast(Tensor, module.weight).detach().t(), cast(Tensor, module.bias)
    with torch.device("meta"):
        linear = nn.Linear(weight_NK.shape[1], weight_NK.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight_NK), nn.Parameter(bias.detach())
    return linear if is_packable(linear) else None


def _packed_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A forward pass that packs at its first use, so that under autocast, which wants torch's own, nothing is."""
    packed: Tensor | None = None
    packing = Lock()

    def forward(x: Tensor) -> Tensor:
        nonlocal packed
        if x.dtype != linear.weight.dtype or torch.is_autocast_enabled("cpu"):
            return F.linear(x, linear.weight, linear.bias)
        if packed is None:
            with packing:  # one thread's, where several compute side by side
                if packed is None:
                    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), _ROWS)
        return torch.ops.mkldnn._linear_pointwise(x, packed, linear.bias, "none", [], "")

    return forward
