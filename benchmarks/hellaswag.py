"""HellaSwag: items per second of gpt2x's evaluation against lm-eval's, the same model, items and precision.

`python scripts/benchmark.py hellaswag --data ITEMS.jsonl --tokenizer DIR [--recipe gpt2] [--items 200]
[--batch_sizes 4 8 16 32 64] [--threads 2] [--dtype float32] [--rounds 3]`

Needs the extra eval. The model has the shape of a recipe in configuration/pretrain (gpt2 is the 124M, quickstart has
2M) and the tokenizer's vocabulary, with random weights. lm-eval scores the stock class by its HFLM, once with each
batch size; what counts is its best. gpt2x scores its GPT2XForCausalLM and, as gpt2x-stock, the same class as lm-eval.
Both start from text. CPU time per item stands beside, for machines that are shared.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmarks.contest import interleave, print_table
from gpt2x.command_line import parse_recipe
from gpt2x.config import Recipe
from gpt2x.distributed.devices import keep_freed_memory
from gpt2x.distributed.launch import usable_cores
from gpt2x.evaluation.hellaswag import evaluate_hellaswag
from gpt2x.evaluation.hellaswag_items import HellaSwagItem, item_texts, load_hellaswag
from gpt2x.models import make_config
from gpt2x.stock_forms import to_stock_config
from gpt2x.tokenizers.bpe import load_tokenizer
from modeling_gpt2x import GPT2XForCausalLM

RECIPES = Path(__file__).parent.parent / "configuration" / "pretrain"
OWN = ("gpt2x", "gpt2x-stock")
Items = Sequence[HellaSwagItem]


def make_model(
    name: str, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype, is_stock: bool
) -> PreTrainedModel:
    """A model of a recipe's shape, as gpt2x's class or as the stock one."""
    recipe, _ = parse_recipe(Recipe, [], script="benchmark.py hellaswag", default_config=RECIPES / f"{name}.yaml")
    config = make_config(recipe.model, tokenizer)
    model = AutoModelForCausalLM.from_config(to_stock_config(config)) if is_stock else GPT2XForCausalLM(config)
    return model.to(_device(), dtype).eval()


def own_evaluation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[Items], object]:
    """gpt2x's evaluation with its own batch size, as scripts/eval_hellaswag.py runs it."""
    if model.device.type == "cpu":
        keep_freed_memory()
    return lambda items: evaluate_hellaswag(model, tokenizer, items)


def peer_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int
) -> Callable[[Items], object]:
    """lm-eval's log-likelihoods of the same texts."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

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
        torch.set_num_threads(options.threads or usable_cores())
    logging.set_verbosity_error()
    tokenizer = load_tokenizer(options.tokenizer)
    items = load_hellaswag(options.data, num_items=options.items)
    dtype = getattr(torch, options.dtype)
    model = make_model(options.recipe, tokenizer, dtype=dtype, is_stock=contestant != "gpt2x")
    if contestant in OWN:
        evaluate = own_evaluation(model, tokenizer)
    else:
        evaluate = peer_evaluation(model, tokenizer, batch_size=int(contestant.removeprefix("lm-eval-")))
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
    parser.add_argument("--tokenizer", type=Path, required=True, help="the directory of the model's tokenizer")
    parser.add_argument("--recipe", default="gpt2", help="the shape: a recipe of configuration/pretrain by its name")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="lm-eval's")
    parser.add_argument("--threads", type=int, help="of a CPU; all usable cores by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    if options.contestant is not None:
        print(json.dumps(measure(options.contestant, options)))
        return
    names = ("data", "tokenizer", "recipe", "items", "dtype", *(["threads"] if options.threads else []))
    arguments = [f"--{name}={getattr(options, name)}" for name in names]
    peers = [f"lm-eval-{batch_size}" for batch_size in options.batch_sizes]
    results = interleave("hellaswag", [*peers, *OWN], arguments, rounds=options.rounds)
    best = max(peers, key=lambda peer: results[peer]["items_per_s"])
    print_table(results, against=best)
    for own in OWN:
        ratio = results[own]["items_per_s"] / results[best]["items_per_s"]
        print(f"{own} scores {ratio:.2f} x the items per second of {best}, the best batch size of lm-eval.")


if __name__ == "__main__":
    main(sys.argv[1:])
