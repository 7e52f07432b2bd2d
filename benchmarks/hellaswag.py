"""HellaSwag on GPT-2 124M: items per second of gpt2x's evaluation against lm-eval's, the same items and precision.

`python scripts/benchmark.py hellaswag --data ITEMS.jsonl --tokenizer DIR [--items 200] [--batch_sizes 4 8 16 32 64]
[--dtype float32] [--rounds 3]`

Needs the extra eval. lm-eval scores transformers' own GPT-2 by its HFLM, once with each batch size; what counts
is its best. gpt2x scores its GPT2XForCausalLM and, as gpt2x-stock, the same class as lm-eval. Both start from text;
random weights. CPU time per item stands beside, for machines that are shared.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmarks.contest import interleave, print_table
from gpt2x.evaluation.hellaswag import evaluate_hellaswag
from gpt2x.evaluation.hellaswag_items import HellaSwagItem, item_texts, load_hellaswag
from gpt2x.training.devices import usable_cores
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

OWN = ("gpt2x", "gpt2x-stock")
Items = Sequence[HellaSwagItem]


def own_evaluation(
    tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype, is_stock: bool
) -> Callable[[Items], object]:
    """gpt2x's evaluation with its own batch size."""
    model = GPT2LMHeadModel(GPT2Config()) if is_stock else GPT2XForCausalLM(GPT2XConfig())
    model = model.to(_device(), dtype).eval()
    return lambda items: evaluate_hellaswag(model, tokenizer, items)


def peer_evaluation(
    tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype, batch_size: int
) -> Callable[[Items], object]:
    """lm-eval's log-likelihoods of the same texts."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = GPT2LMHeadModel(GPT2Config()).to(_device(), dtype).eval()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(_device()))

    def evaluate(items: Items) -> object:
        texts = [item_texts(item, "hellaswag") for item in items]
        pairs = [(context, f" {ending}") for context, endings in texts for ending in endings]
        requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
        return harness.loglikelihood(requests, disable_tqdm=True)

    return evaluate


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def measure(contestant: str, options: argparse.Namespace) -> dict[str, float]:
    """Items per second and seconds of CPU time per item of one contestant in this process."""
    torch.manual_seed(0)
    if not torch.accelerator.is_available():
        torch.set_num_threads(usable_cores(1))
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    items = load_hellaswag(options.data, num_items=options.items)
    dtype = getattr(torch, options.dtype)
    if contestant in OWN:
        evaluate = own_evaluation(tokenizer, dtype=dtype, is_stock=contestant == "gpt2x-stock")
    else:
        evaluate = peer_evaluation(tokenizer, dtype=dtype, batch_size=int(contestant.removeprefix("lm-eval-")))
    evaluate(items[:8])
    started, cpu_started = time.perf_counter(), time.process_time()
    evaluate(items)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {"items_per_s": len(items) / seconds, "cpu_s_per_item": cpu_seconds / len(items)}


def main(argv: list[str]) -> None:
    """Measures one contestant where it is named, else all of them by turns."""
    parser = argparse.ArgumentParser(prog="benchmark.py hellaswag", description=__doc__)
    parser.add_argument("contestant", nargs="?")
    parser.add_argument("--data", type=Path, required=True, help="HellaSwag's validation items, .jsonl")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the directory of GPT-2's tokenizer")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="lm-eval's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    if options.contestant is not None:
        print(json.dumps(measure(options.contestant, options)))
        return
    names = ("data", "tokenizer", "items", "dtype")
    arguments = [f"--{name}={getattr(options, name)}" for name in names]
    peers = [f"lm-eval-{batch_size}" for batch_size in options.batch_sizes]
    results = interleave("hellaswag", [*peers, *OWN], arguments, rounds=options.rounds)
    print_table(results, against=max(peers, key=lambda peer: results[peer]["items_per_s"]))


if __name__ == "__main__":
    main(sys.argv[1:])
