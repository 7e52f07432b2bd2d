"""EleutherAI's lm-evaluation-harness on a model of ours, or of anyone."""

from typing import Any

import torch

from gpt2x.commands import tool
from gpt2x.config import LmEvalRecipe
from gpt2x.errors import UserError
from gpt2x.locate import find_model
from gpt2x.models import load_for_inference
from gpt2x.prerequisites import check_installed
from gpt2x.tokenizers.bpe import load_tokenizer


def run_lm_eval(recipe: LmEvalRecipe, device: torch.device | None = None) -> dict[str, dict[str, Any]]:
    """Evaluates a model on the recipe's tasks.

    The model is handed over as loaded here, so that gpt2x's own form needs no remote code either.

    Args:
        recipe: which model, and which tasks.
        device: where the model computes; None for the CPU. See compute_device.

    Returns:
        Per task its metrics by lm-eval's names (``acc,none``), with its version and the number of items.

    Raises:
        UserError: where lm-eval is not installed, or does not know a task.
    """
    check_installed("eval", what="run_lm_eval.py")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = [name.strip() for name in recipe.tasks.split(",") if name.strip()]
    known = TaskManager(include_path=None if recipe.include_path is None else str(recipe.include_path))
    unknown = [name for name in tasks if name not in known.all_tasks]
    if unknown:
        raise UserError(f"lm-eval knows no task {', '.join(unknown)}; `{tool('lm_eval', 'ls', 'tasks')}` lists them.")
    directory = find_model(recipe.model)
    model = load_for_inference(directory, dtype=getattr(torch, recipe.dtype), device=device)
    evaluated = simple_evaluate(
        model=HFLM(
            pretrained=model,
            tokenizer=load_tokenizer(directory),
            batch_size=recipe.batch_size,
            device=str(model.device),
        ),
        tasks=tasks,
        task_manager=known,
        limit=recipe.limit,
        num_fewshot=recipe.num_fewshot,
        log_samples=False,
    )
    return {name: _record(name, evaluated) for name in evaluated["results"]}


def _record(name: str, evaluated: dict[str, Any]) -> dict[str, Any]:
    metrics = {key: value for key, value in evaluated["results"][name].items() if isinstance(value, int | float)}
    counts = evaluated["n-samples"].get(name, {})
    return metrics | {"version": evaluated["versions"].get(name), "num_items": counts.get("effective")}
