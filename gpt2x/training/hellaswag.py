"""HellaSwag beside every validation of a run, on a fixed part of its items."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.config import TrainingRecipe
from gpt2x.evaluation.hellaswag import HellaSwag, HellaSwagQuestions, result_record, score_hellaswag
from gpt2x.evaluation.hellaswag_items import load_run_items


class RunHellaSwag:
    """The items that a recipe asks for, encoded once, and what the run's model last made of them.

    Attributes:
        latest: None before the first evaluation.
    """

    def __init__(self, questions: HellaSwagQuestions, *, batch_size: int, mixed_precision: str) -> None:
        self.questions, self.batch_size, self.mixed_precision = questions, batch_size, mixed_precision
        self.latest: HellaSwag | None = None

    def score(self, model: nn.Module, accelerator: Accelerator, is_stopped: Callable[[], bool]) -> HellaSwag | None:
        """Scores the items, split over the ranks, in the precision that the model is prepared for.

        Args:
            model: as the accelerator prepared it; left as it was.
            accelerator: of the run.
            is_stopped: asked before each batch; must answer alike on all ranks.

        Returns:
            The result, the same on all ranks; None where is_stopped ended it.
        """
        scores = score_hellaswag(
            model, self.questions, batch_size=self.batch_size, accelerator=accelerator, is_stopped=is_stopped
        )
        self.latest = scores or self.latest
        return scores

    def results(self) -> dict[str, dict[str, Any]]:
        """The latest figures by their name, for the "evaluation" of stats.json.

        The name is that which scripts/eval_hellaswag.py gives the same items; it tells where the precision was mixed.
        """
        if self.latest is None:
            return {}
        precision = "float32" if self.mixed_precision == "no" else f"mixed_{self.mixed_precision}"
        return dict([result_record(precision, self.latest)])


def open_hellaswag(
    recipe: TrainingRecipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> RunHellaSwag | None:
    """Reads and checks the items on every rank; None where the recipe asks for none.

    Raises:
        UserError: for whatever is wrong with the items, and where the model is too short for one of them.
    """
    section = recipe.evaluation
    if section.hellaswag is None:
        return None
    # of a machine's processes one downloads, and the others find it there
    with accelerator.local_main_process_first() if section.hellaswag == "hub" else nullcontext():
        items = load_run_items(section)
    questions = HellaSwagQuestions.of(tokenizer, items)
    questions.check(model)
    # at most the tokens of a validation batch, which fits into the memory
    fitting = section.batch_size * recipe.data.sequence_length // max(questions.num_tokens)
    return RunHellaSwag(
        questions,
        batch_size=max(min(fitting, questions.items_per_pass(accelerator.device)), 1),
        mixed_precision=recipe.train.mixed_precision,
    )
