"""Decoding on a CPU with packed weights: the same matrix products, nearer to what the memory can deliver.

A decoding step multiplies a few rows by every weight once, so its time is that of reading the weights. torch's linear
reads them at about half of the memory's speed; oneDNN's layout, in blocks that fit its kernels, gets up to twice as
far (`scripts/benchmark.py generate`). The layout is a second copy of the weights, kept while the model generates.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

# Rows of one decoding step: beyond, arithmetic counts more than reading.
MAX_ROWS = 64
# Packing a weight takes as long as it saves in 10 (bfloat16) to 40 (float32, one row) steps; a short text packs none.
STEPS_BEFORE_PACKING = 24
MAX_PACKED_BYTES = 4 * 2**30


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Lets plain Linear modules on the CPU decode with packed weights inside the block, in which no weight may change.

    Results differ from the plain ones by rounding. Modules that are more than a Linear (LoRA, quantized, sharded,
    hooked) and whatever needs gradients or compiles stays as it is; so does a model of more than 4 GiB.
    """
    modules = [module for module in model.modules() if isinstance(module, nn.Linear) and is_packable(module)]
    if sum(module.weight.nbytes for module in modules) > MAX_PACKED_BYTES:
        modules = []
    try:
        for module in modules:
            module.__dict__["forward"] = _packing_forward(module)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def is_packable(module: nn.Linear) -> bool:
    """Whether oneDNN can take the place of this module's own forward pass."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or "forward" in module.__dict__:
        return False
    if module.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if module.weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return module.weight.dtype == torch.float32


def _packing_forward(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward pass for `module` that packs its weight once it has seen a few decoding steps."""
    packed: torch.Tensor | None = None
    steps = 0

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal packed, steps
        rows = x.numel() // x.shape[-1]
        if rows > MAX_ROWS or x.dtype != module.weight.dtype or torch.is_grad_enabled() or _is_transformed(x):
            return F.linear(x, module.weight, module.bias)
        steps += 1
        if steps < STEPS_BEFORE_PACKING:
            return F.linear(x, module.weight, module.bias)
        if packed is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
        return torch.ops.mkldnn._linear_pointwise(x, packed, module.bias, "none", [], "")

    return forward


def _is_transformed(x: torch.Tensor) -> bool:
    """Whether a compiler or autocast is to see torch's own linear."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or type(x) is not torch.Tensor


__all__ = ["is_packable", "packed_linears"]
