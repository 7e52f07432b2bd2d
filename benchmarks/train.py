"""Training speed: GPT2X against GPT2LMHeadModel, GPT-2 124M, the same shapes, precision and threads.

`python scripts/benchmark.py train [--rows 4] [--length 1024] [--steps 5] [--rounds 3]
[--against transformers gpt2x]`

The peer is transformers' own GPT-2 in a plain loop at its best ordinary settings: dropout 0, SDPA, fused AdamW, bf16
autocast, eager and compiled. gpt2x runs its own step as scripts/pretrain.py does. Steps before the measured ones warm
up; what compilation took is shown beside. Peak memory is the process's largest resident set, on a GPU the allocator's.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.contest import interleave, print_table
from gpt2x.config import OptimizerSection
from gpt2x.distributed.devices import keep_freed_memory
from gpt2x.distributed.launch import usable_cores
from gpt2x.training.cpu_attention import register_chunked_causal
from gpt2x.training.optimizers import make_optimizers
from gpt2x.training.start import compile_layers
from gpt2x.training.steps import accumulate_losses, clip_gradients
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

CONTESTANTS = ("transformers", "transformers-compiled", "gpt2x", "gpt2x-compiled")


def peer_step(rows: int, length: int, *, compiled: bool) -> Callable[[], float]:
    """One optimizer step of transformers' GPT-2."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, n_positions=length)
    model: nn.Module = GPT2LMHeadModel(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model
    ids = torch.randint(0, config.vocab_size, (rows, length), device=device)

    def step() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def own_step(rows: int, length: int, *, compiled: bool) -> Callable[[], float]:
    """One optimizer step of gpt2x: exact GPT-2 with the parts of its own loop."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="bf16")
    model = GPT2XForCausalLM(GPT2XConfig(max_position_embeddings=length))
    optimizers = make_optimizers(model, OptimizerSection())
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        model.set_attn_implementation(register_chunked_causal())
    if compiled:
        compile_layers(model)
    model, optimizer = accelerator.prepare(model, *optimizers)
    ids = torch.randint(0, model.config.vocab_size, (rows, length))

    def step() -> float:
        loss = accumulate_losses(accelerator, model, [{"input_ids": ids, "labels": ids}]).shares.sum()
        clip_gradients(accelerator, model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(contestant: str, *, rows: int, length: int, steps: int) -> dict[str, float]:
    """Tokens per second, peak memory and the first step's seconds of one contestant in this process."""
    torch.manual_seed(0)
    if not torch.accelerator.is_available():
        torch.set_num_threads(usable_cores())
    make = own_step if contestant.startswith("gpt2x") else peer_step
    step = make(rows, length, compiled=contestant.endswith("compiled"))
    first_s = _timed(step)
    step()
    seconds = sorted(_timed(step) for _ in range(steps))
    return {
        "tokens_per_s": rows * length / seconds[len(seconds) // 2],
        "peak_memory_gib": _peak_bytes() / 2**30,
        "first_step_s": first_s,
    }


def _timed(step: Callable[[], float]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str]) -> None:
    """Measures one contestant where it is named, else all of them by turns."""
    parser = argparse.ArgumentParser(prog="benchmark.py train", description=__doc__)
    parser.add_argument("contestant", nargs="?", choices=CONTESTANTS)
    parser.add_argument("--against", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="who takes part")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    if options.contestant is not None:
        shape = {"rows": options.rows, "length": options.length, "steps": options.steps}
        print(json.dumps(measure(options.contestant, **shape)))
        return
    arguments = [f"--rows={options.rows}", f"--length={options.length}", f"--steps={options.steps}"]
    print_table(interleave("train", options.against, arguments, rounds=options.rounds), against=options.against[0])


if __name__ == "__main__":
    main(sys.argv[1:])
