"""Products with large weights: head and loss in chunks of tokens, and packed weights for decoding on a CPU.

Shapes: N tokens, C hidden size, V vocabulary, P vocabulary and padding, R rows of one chunk.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

IGNORE_INDEX = -100
# 50,304 rows instead of GPT-2's 50,257 make the weight's gradient 1.4x faster on AVX-512 cores; tensor cores want 8.
ROW_ALIGNMENT = 64
# float16 ends at 6e-8, where probabilities of a large vocabulary do not. d loss / d logits is at most 1, so between it
# and the largest float16, 65504, there is room.
FLOAT16_STRETCH = 2.0**15
# Rows of one decoding step: beyond, arithmetic counts more than reading.
MAX_ROWS = 64
# Packing a weight takes as long as it saves in 10 (bfloat16) to 40 (float32, one row) steps; a short text packs none.
STEPS_BEFORE_PACKING = 24
MAX_PACKED_BYTES = 4 * 2**30


def to_matmul_dtype(x: torch.Tensor) -> torch.Tensor:
    """Casts once to the autocast dtype, where autocast would cast again for every projection reading `x`."""
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` is x @ weight.T + bias and no more: no LoRA, quantization, DTensor, hooks, other forward."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


# ---------------------------------------------------------------------------------------------------------- loss


def shift_left(labels: torch.Tensor) -> torch.Tensor:
    """The label of each position's next token, (B, T); the last position of a row predicts nothing."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def chunked_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    softcap: float | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T` against `labels` without ever holding all logits: a float32 scalar.

    The gradients with respect to `hidden` and `weight` are computed together with the loss, chunk by chunk, so that
    there are three matrix products in all and nothing is recomputed. The products run in the autocast dtype, the
    softmax and all sums in float32. Under float16 the gradients are float32 until the scale of the loss has been
    applied to them, so that it decides what overflows. Not twice differentiable.

    Args:
        hidden: (..., C), the output of the final norm.
        weight: (V, C), the head's weight.
        labels: (...), the token which each row of `hidden` predicts (already shifted); -100 is ignored.
        softcap: cap c of c * tanh(logits / c), arXiv:2408.00118.
        num_items_in_batch: what the summed loss is divided by; `None` takes the labels not ignored, or 1.
        chunk_size: rows per chunk; `None` chooses one.
        vocab_size: rows of `weight` that are tokens; padding rows behind get neither probability nor gradient.
    """
    hidden_NC = hidden.reshape(-1, hidden.shape[-1])
    labels_N = labels.reshape(-1).to(hidden.device)
    valid_N = labels_N != IGNORE_INDEX
    if num_items_in_batch is None:
        num_items_in_batch = valid_N.sum().clamp(min=1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        # Ignored rows are dropped where that costs neither a device's synchronization nor a graph break.
        kept = valid_N.nonzero().squeeze(1)
        if 0 < len(kept) < 0.9 * len(valid_N):
            hidden_NC, labels_N = hidden_NC.index_select(0, kept), labels_N.index_select(0, kept)
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    vocab_size = vocab_size or weight.shape[0]
    chunk_size = chunk_size or _rows_per_chunk(len(labels_N), vocab_size)
    options = (softcap, chunk_size, vocab_size, needs_gradient)
    return _ChunkedLinearCrossEntropy.apply(hidden_NC, weight, labels_N, *options) / num_items_in_batch


def _rows_per_chunk(num_tokens: int, vocab_size: int) -> int:
    """A quarter of the tokens, at most 128 MiB of bfloat16 logits; fewer than 512 would starve the products."""
    return max(512, min(2**26 // vocab_size, math.ceil(num_tokens / 4)))


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; its forward computes the gradients as well."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: torch.Tensor,
        weight_VC: torch.Tensor,
        labels_N: torch.Tensor,
        softcap: float | None,
        chunk_size: int,
        vocab_size: int,
        needs_gradient: bool,
    ) -> torch.Tensor:
        h_NC = to_matmul_dtype(hidden_NC)
        w_PC = _aligned_copy(weight_VC[:vocab_size], h_NC.dtype)
        valid_N1 = (labels_N != IGNORE_INDEX).unsqueeze(1)
        target_N1 = labels_N.unsqueeze(1).masked_fill(~valid_N1, 0)
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_NC.device)
        grad_h_chunks, grad_w_PC = [], None
        for start in range(0, h_NC.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            logits_RP = h_NC[rows] @ w_PC.T
            logits_RV = logits_RP[:, :vocab_size]
            loss_R1 = _cross_entropy_and_gradient_(logits_RV, target_N1[rows], softcap, needs_gradient)
            loss_sum += torch.where(valid_N1[rows], loss_R1, 0.0).sum()
            if needs_gradient:
                # Rows of ignored labels are zeroed here, where they are C wide, and not in the V wide gradient.
                grad_h_chunks.append(_product(logits_RP, w_PC).mul_(valid_N1[rows]))
                h_RC = h_NC[rows] * valid_N1[rows]
                if grad_w_PC is None:
                    grad_w_PC = _product(logits_RP.T, h_RC).float()
                elif h_RC.dtype == torch.float32:
                    grad_w_PC.addmm_(logits_RP.T, h_RC)
                else:
                    grad_w_PC.add_(_product(logits_RP.T, h_RC))
        if grad_w_PC is not None:
            ctx.save_for_backward(torch.cat(grad_h_chunks), grad_w_PC[:vocab_size])
        ctx.num_padding_rows = weight_VC.shape[0] - vocab_size
        ctx.dtypes = hidden_NC.dtype, weight_VC.dtype
        return loss_sum

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_h_NC, grad_w_VC = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        grad_hidden = (grad_h_NC * grad_output).to(hidden_dtype)
        grad_weight = (grad_w_VC * grad_output).to(weight_dtype)
        if ctx.num_padding_rows:
            grad_weight = F.pad(grad_weight, (0, 0, 0, ctx.num_padding_rows))
        return grad_hidden, grad_weight, None, None, None, None, None


def _aligned_copy(weight_VC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight for the products; this copy alone has rows of zeros up to a multiple of what kernels tile by."""
    num_padding_rows = -weight_VC.shape[0] % ROW_ALIGNMENT
    if weight_VC.shape[0] < 64 * ROW_ALIGNMENT or num_padding_rows == 0:
        return weight_VC.to(dtype)
    w_PC = weight_VC.new_zeros(weight_VC.shape[0] + num_padding_rows, weight_VC.shape[1], dtype=dtype)
    w_PC[: weight_VC.shape[0]] = weight_VC
    return w_PC


def _cross_entropy_and_gradient_(
    logits_RV: torch.Tensor, target_R1: torch.Tensor, softcap: float | None, needs_gradient: bool
) -> torch.Tensor:
    """Returns the (R, 1) float32 losses, and overwrites the logits by the gradient of their sum.

    Eager CPU code does so in blocks that fit the cache, where passes are cheap; a compiler fuses them by itself.
    """
    in_blocks = logits_RV.device.type == "cpu" and not torch.compiler.is_compiling()
    block_size = max(1, 2**18 // logits_RV.shape[1]) if in_blocks else logits_RV.shape[0]
    losses = []
    for logits, target in zip(logits_RV.split(block_size), target_R1.split(block_size)):
        capped = logits.float() if softcap is None else torch.tanh(logits.float() / softcap) * softcap
        log_p = torch.log_softmax(capped, dim=-1)
        losses.append(-log_p.gather(1, target))
        if needs_gradient:
            # d loss / d logits = softmax - one-hot, times the derivative of the cap.
            gradient = log_p.exp_().scatter_add_(1, target, -torch.ones_like(losses[-1]))
            gradient = gradient if softcap is None else gradient * (1 - (capped / softcap).square())
            logits.copy_(gradient * FLOAT16_STRETCH if logits.dtype == torch.float16 else gradient)
    return torch.cat(losses)


def _product(grad_logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of the gradient of the logits with another matrix; in float32 where that gradient is a stretched float16."""
    if grad_logits.dtype != torch.float16:
        return grad_logits @ other
    if grad_logits.is_cuda and torch.version.hip is None:
        product = torch.mm(grad_logits, other, out_dtype=torch.float32)
    else:
        with torch.autocast(grad_logits.device.type, enabled=False):
            product = grad_logits.float() @ other.float()
    return product.div_(FLOAT16_STRETCH)


# ------------------------------------------------------------------------------------------------------ decoding
@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Lets plain Linear modules on the CPU decode with packed weights inside the block, in which no weight may change.

    A decoding step takes as long as reading every weight once: at about half of the memory's speed by torch's linear,
    up to twice as fast in oneDNN's layout (`scripts/benchmark.py generate`), which is a second copy of the weights.
    Results differ by rounding. What needs gradients or compiles stays as it is; so does a model of more than 4 GiB.
    """
    modules = [module for module in model.modules() if is_packable(module)]
    if sum(module.weight.nbytes for module in modules) > MAX_PACKED_BYTES:
        modules = []
    try:
        for module in modules:
            module.__dict__["forward"] = _packing_forward(module)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether oneDNN can take the place of this module's own forward pass."""
    if not is_plain_linear(module) or module.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
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
        is_plain = type(x) is torch.Tensor and x.dtype == module.weight.dtype and not torch.is_autocast_enabled("cpu")
        is_step = is_plain and rows <= MAX_ROWS and not (torch.compiler.is_compiling() or torch.is_grad_enabled())
        if is_step:
            steps += 1
        if not is_step or steps < STEPS_BEFORE_PACKING:
            return F.linear(x, module.weight, module.bias)
        if packed is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
        return torch.ops.mkldnn._linear_pointwise(x, packed, module.bias, "none", [], "")

    return forward
