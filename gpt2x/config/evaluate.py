"""What scripts/eval_hellaswag.py and scripts/run_lm_eval.py run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from gpt2x.config.checks import Range, Size, check_numbers, shown


@dataclass(frozen=True, kw_only=True)
class HellaSwagRecipe:
    """Scores a model on HellaSwag (arXiv:1905.07830), zero-shot."""

    model: str = "runs/quickstart"
    """Directory or Hub id of a model, or the directory of a run, whose stats.json then gets the result."""
    data: str = "hub"
    """A .jsonl file with the columns of the Hub's Rowan/hellaswag; hub for its validation split (network)."""
    num_items: Size | None = None
    """A fixed subset of that size, items at equal distances, named in the result; null for all."""
    style: Literal["hellaswag", "hellaswag_completion"] = "hellaswag"
    """lm-eval's task hellaswag, or the text as it stands, as llm.c and build-nanogpt score it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and arithmetic."""
    quantize: Literal["int8"] | None = None
    """Also score the model with its linear layers in int8, on the CPU, and show the difference."""
    batch_size: Size | None = None
    """Items of a forward pass; null for what suits the device. The result does not depend on it."""

    def __post_init__(self) -> None:
        check_numbers(self, "")


@dataclass(frozen=True, kw_only=True)
class LmEvalRecipe:
    """Runs tasks of EleutherAI's lm-evaluation-harness on a model."""

    model: str = "runs/quickstart"
    """Directory or Hub id of a model, or the directory of a run, whose stats.json then gets the results."""
    tasks: str
    """Names of tasks, with commas between them."""
    include_path: Path | None = None
    """Directory with tasks of one's own, YAML files."""
    limit: Size | None = None
    """Only the first so many items of each task; null for all."""
    num_fewshot: Annotated[int, Range(least=0, most=10_000)] | None = None
    """Examples before each item; null for what the task says."""
    batch_size: Size = 8
    """Requests of a forward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and arithmetic."""

    def __post_init__(self) -> None:
        check_numbers(self, "")
        if not [name for name in self.tasks.split(",") if name.strip()]:
            raise ValueError(f"tasks ({shown(self.tasks)}) must name at least one task, as in --tasks hellaswag,piqa.")
