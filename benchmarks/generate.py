"""Generation speed: GPT2X against GPT2LMHeadModel.generate, GPT-2 124M, greedy, the same weights' shape and threads.

`python scripts/benchmark.py generate [--new_tokens 512] [--rounds 3] [--batches 1 16] [--dtypes float32 bfloat16]`

Both call plain `model.generate` with its default cache, dropout 0, in processes of their own and by turns. Beside the
rate stands the bound that memory sets: a step reads every weight once, at no more than the speed of a large copy.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks.contest import interleave, print_table
from gpt2x.distributed.launch import usable_cores
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

PROMPT_TOKENS = 32


def make_peer() -> PreTrainedModel:
    """transformers' GPT-2 without dropout."""
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def make_own() -> PreTrainedModel:
    """Exact GPT-2 by gpt2x."""
    return GPT2XForCausalLM(GPT2XConfig())


CONTESTANTS: dict[str, Callable[[], PreTrainedModel]] = {"transformers": make_peer, "gpt2x": make_own}


def measure(contestant: str, *, batch: int, dtype: str, new_tokens: int) -> dict[str, float]:
    """Tokens per second of a whole call to generate, and the most that reading the weights allows."""
    torch.manual_seed(0)
    if not torch.accelerator.is_available():
        torch.set_num_threads(usable_cores())
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = CONTESTANTS[contestant]().to(device=device, dtype=getattr(torch, dtype)).eval()
    _generate(model, batch, 8)
    started, started_cpu = time.perf_counter(), time.process_time()
    _generate(model, batch, new_tokens)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    embedding = model.get_input_embeddings().weight
    # Each step reads all weights but the table of positions; that of the tokens is the head.
    read = sum(parameter.nbytes for parameter in model.parameters()) - 1024 * embedding[0].nbytes
    return {
        "tokens_per_s": batch * new_tokens / seconds,
        "tokens_per_cpu_s": batch * new_tokens / cpu_seconds,
        "bound_tokens_per_s": batch * copy_bandwidth(device) / read,
    }


def _generate(model: PreTrainedModel, batch: int, new_tokens: int) -> None:
    prompt = torch.randint(0, model.config.vocab_size, (batch, PROMPT_TOKENS), device=model.device)
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=50256, **lengths
    )
    assert output.cpu().shape[1] == PROMPT_TOKENS + new_tokens


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of the fastest of several copies of 256 MiB."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    fastest = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        target[-1].item()
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * source.nbytes / fastest


def main(argv: list[str]) -> None:
    """Measures one contestant where it is named, else both by turns for every batch size and dtype."""
    parser = argparse.ArgumentParser(prog="benchmark.py generate", description=__doc__)
    parser.add_argument("contestant", nargs="?", choices=CONTESTANTS)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--new_tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    if options.contestant is not None:
        [batch], [dtype] = options.batches, options.dtypes
        print(json.dumps(measure(options.contestant, batch=batch, dtype=dtype, new_tokens=options.new_tokens)))
        return
    for dtype in options.dtypes:
        for batch in options.batches:
            print(f"batch {batch}, {dtype}, {options.new_tokens} new tokens", flush=True)
            arguments = [f"--batches={batch}", f"--dtypes={dtype}", f"--new_tokens={options.new_tokens}"]
            found = interleave("generate", list(CONTESTANTS), arguments, rounds=options.rounds)
            print_table(found, against="transformers")


if __name__ == "__main__":
    main(sys.argv[1:])
