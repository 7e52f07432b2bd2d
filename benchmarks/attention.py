"""Causal attention on a CPU, forward and backward: chunks of plain products against torch's SDPA.

`python scripts/benchmark.py attention`
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gpt2x.distributed.launch import usable_cores
from gpt2x.training.cpu_attention import chunked_causal_attention

SHAPES_BTHD = ((16, 128, 4, 48), (8, 256, 2, 128), (8, 512, 4, 64), (4, 1024, 12, 64))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return chunked_causal_attention(nn.Module(), q, k, v, None)[0]


def _seconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> float:
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
    started = time.perf_counter()
    attention(q, k, v).backward(torch.ones(shape, dtype=torch.bfloat16))
    return time.perf_counter() - started


def main(_argv: list[str]) -> None:
    """Prints microseconds per token and layer of both, measured by turns, and their ratio."""
    torch.set_num_threads(usable_cores())
    print(f"{'B, T, H, D':>22s}  {'sdpa':>8s}  {'chunked':>8s}  speedup")
    for shape in SHAPES_BTHD:
        times: dict[str, list[float]] = {"sdpa": [], "chunked": []}
        for _ in range(12):
            times["sdpa"].append(_seconds(_sdpa, shape))
            times["chunked"].append(_seconds(_chunked, shape))
        per_token = {name: statistics.median(found[2:]) / (shape[0] * shape[1]) * 1e6 for name, found in times.items()}
        ratio = per_token["sdpa"] / per_token["chunked"]
        print(f"{shape!s:>22s}  {per_token['sdpa']:8.2f}  {per_token['chunked']:8.2f}  {ratio:.2f} x")
