"""Scores a model on HellaSwag: `python scripts/eval_hellaswag.py MODEL --data FILE.jsonl|hub [--FIELD VALUE ...]`.

MODEL is a directory or Hub id of any causal language model, or the directory of a run, whose stats.json then gets the
result. `--quantize int8` scores the model with its linear layers in int8 as well. Under `accelerate launch` the items
are split over the processes.
"""

import os
import sys

from gpt2x.command_line import parse_recipe
from gpt2x.config import HellaSwagRecipe
from gpt2x.evaluation.hellaswag_items import load_hellaswag
from gpt2x.prerequisites import check_model
from gpt2x.terminal import command


def main(recipe: HellaSwagRecipe) -> None:
    """Prints the scores as a table and records them with the run."""
    # 1. The items, before the model is loaded for nothing
    directory = check_model(recipe.model)
    items = load_hellaswag(recipe.data, num_items=recipe.num_items)
    import torch  # seconds, which a mistake need not wait for
    from accelerate import Accelerator
    from transformers.utils import logging

    from gpt2x.distributed.devices import compute_device, keep_freed_memory
    from gpt2x.evaluation.hellaswag import HellaSwag, evaluate_hellaswag, print_scores, result_record
    from gpt2x.evaluation.quantization import num_bytes, quantize_int8
    from gpt2x.models import load_for_inference
    from gpt2x.runs.results import record_results
    from gpt2x.tokenizers.bpe import load_tokenizer

    # 2. The model
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(directory)
    on_cpu = recipe.quantize is not None or compute_device(os.environ).type == "cpu"
    if on_cpu:
        keep_freed_memory()
    accelerator = Accelerator(cpu=on_cpu)
    model = load_for_inference(directory, dtype=getattr(torch, recipe.dtype), device=accelerator.device)

    # 3. The scores, as loaded and in int8
    scores: dict[str, HellaSwag] = {}
    sizes: dict[str, int] = {}
    for precision in filter(None, (recipe.dtype, recipe.quantize)):
        if precision == recipe.quantize:
            model = quantize_int8(model)
        scores[precision] = evaluate_hellaswag(
            model, tokenizer, items, style=recipe.style, batch_size=recipe.batch_size, accelerator=accelerator
        )
        sizes[precision] = num_bytes(model)

    # 4. What came out
    if accelerator.is_main_process:
        stats_file = record_results(directory, dict(result_record(*entry) for entry in scores.items()))
        print_scores(scores, sizes)
        if stats_file is not None:
            print(f"recorded in {stats_file}")
    accelerator.end_training()  # a group of processes that outlives Python's end may abort it


if __name__ == "__main__":
    with command(os.environ):
        parsed, _ = parse_recipe(HellaSwagRecipe, sys.argv[1:], script="eval_hellaswag.py", positional="model")
        main(parsed)
