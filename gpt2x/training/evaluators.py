"""What is measured of a model while it trains: a list of evaluators, which the loop runs when they are due.

Another benchmark is a class in a file of its own, a field of the recipe's ``evaluation``, and a line of
``make_evaluators``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeAlias

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from gpt2x.config import TrainingRecipe
from gpt2x.evaluation.hellaswag import HellaSwag, HellaSwagQuestions, result_record, score_hellaswag
from gpt2x.evaluation.hellaswag_items import load_run_items
from gpt2x.evaluation.samples import sample_texts
from gpt2x.evaluation.validation import Validation, validate
from gpt2x.training.data import RunData
from gpt2x.training.recording import Recorder

Metrics: TypeAlias = dict[str, float]


class Evaluator(ABC):
    """Something that is measured of the model.

    Attributes:
        name: what it is called where its result is shown.
        every_steps: how many steps lie between two runs of it; None for the end only, when every evaluator is run.
    """

    def __init__(self, name: str, *, every_steps: int | None) -> None:
        self.name, self.every_steps = name, every_steps

    @abstractmethod
    def run(self, model: nn.Module, accelerator: Accelerator, is_stopped: Callable[[], bool]) -> Metrics | None:
        """Measures the model, and leaves it and torch's random numbers as they were.

        Args:
            model: as the accelerator prepared it.
            accelerator: of the run, all of whose ranks call this together.
            is_stopped: asked now and then; answers alike on all ranks.

        Returns:
            What metrics.jsonl is to hold, the same on all ranks; None where is_stopped ended it.
        """

    def summary(self) -> str:
        """The last result in words, to follow the name; empty where nothing is to be said."""
        return ""

    def results(self) -> dict[str, dict[str, Any]]:
        """The last result by its name, for the "evaluation" of stats.json."""
        return {}


def make_evaluators(
    recipe: TrainingRecipe, model: PreTrainedModel, *, data: RunData, accelerator: Accelerator, recorder: Recorder
) -> list[Evaluator]:
    """What a recipe asks for, in the order in which it is run.

    Raises:
        UserError: for whatever is wrong with the items of a benchmark.
    """
    evaluators: list[Evaluator] = [HeldOutLoss(recipe, data)]
    if recipe.evaluation.hellaswag is not None:
        evaluators.append(HellaSwagItems(recipe, data, model=model, accelerator=accelerator))
    return [*evaluators, Samples(recipe, data, recorder=recorder)]


class HeldOutLoss(Evaluator):
    """The validation on the whole held-out set.

    Attributes:
        latest: the last result; None before the first.
    """

    def __init__(self, recipe: TrainingRecipe, data: RunData) -> None:
        super().__init__("validation", every_steps=recipe.evaluation.eval_steps)
        self.batches = data.validation_batches
        self.latest: Validation | None = None

    def run(self, model: nn.Module, accelerator: Accelerator, is_stopped: Callable[[], bool]) -> Metrics | None:
        """See Evaluator; ``val/loss`` is what decides about the best checkpoint and the end of a run."""
        num_bytes = self.batches.num_bytes
        found = validate(model, self.batches, num_bytes=num_bytes, accelerator=accelerator, is_stopped=is_stopped)
        self.latest = found or self.latest
        return None if found is None else found.metrics()

    def summary(self) -> str:
        """Loss, bits per byte, perplexity and accuracy."""
        assert self.latest is not None
        return (
            f"loss {self.latest.loss:.4f}, {self.latest.bits_per_byte:.4f} bits per byte, perplexity "
            f"{self.latest.perplexity:.2f}, token accuracy {self.latest.token_accuracy:.1%}"
        )


class HellaSwagItems(Evaluator):
    """HellaSwag on a fixed part of its items, which are encoded once.

    Attributes:
        latest: the last result; None before the first.
    """

    def __init__(
        self, recipe: TrainingRecipe, data: RunData, *, model: PreTrainedModel, accelerator: Accelerator
    ) -> None:
        """Reads and checks the items that the recipe asks for, on every rank.

        Raises:
            UserError: for whatever is wrong with the items, and where the model is too short for one of them.
        """
        section, mixed_precision = recipe.evaluation, recipe.train.mixed_precision
        # of a machine's processes one downloads, and the others find it there
        with accelerator.local_main_process_first() if section.hellaswag == "hub" else nullcontext():
            items = load_run_items(section)
        self.questions = HellaSwagQuestions.of(data.tokenizer, items)
        self.questions.check(model)
        super().__init__(self.questions.style, every_steps=section.eval_steps)
        # at most the tokens of a validation batch, which fits into the memory
        fitting = section.batch_size * recipe.data.sequence_length // max(self.questions.num_tokens)
        self.batch_size = max(min(fitting, self.questions.items_per_pass(accelerator.device)), 1)
        self.precision = "float32" if mixed_precision == "no" else f"mixed_{mixed_precision}"
        self.latest: HellaSwag | None = None

    def run(self, model: nn.Module, accelerator: Accelerator, is_stopped: Callable[[], bool]) -> Metrics | None:
        """See Evaluator; the items are split over the ranks, in the precision that the model is prepared for."""
        found = score_hellaswag(
            model, self.questions, batch_size=self.batch_size, accelerator=accelerator, is_stopped=is_stopped
        )
        self.latest = found or self.latest
        return None if found is None else found.metrics()

    def summary(self) -> str:
        """Both accuracies with their standard errors."""
        assert self.latest is not None
        return (
            f"on {self.latest.num_items:,} items, acc {self.latest.acc:.4f} ± {self.latest.acc_stderr:.4f}, "
            f"acc_norm {self.latest.acc_norm:.4f} ± {self.latest.acc_norm_stderr:.4f}"
        )

    def results(self) -> dict[str, dict[str, Any]]:
        """By the name that scripts/eval_hellaswag.py gives the same items; it tells where the precision was mixed."""
        return {} if self.latest is None else dict([result_record(self.precision, self.latest)])


class Samples(Evaluator):
    """Texts that continue the prompts, printed and appended to samples.jsonl as each is written.

    Attributes:
        prompts: what is continued.
    """

    def __init__(self, recipe: TrainingRecipe, data: RunData, *, recorder: Recorder) -> None:
        section = recipe.evaluation
        super().__init__("samples", every_steps=section.sample_steps)
        beginnings = data.validation_batches.document_beginnings(section.num_validation_prompts, 32)
        self.prompts = (*section.prompts, *(data.tokenizer.decode(ids) for ids in beginnings))
        self.tokenizer, self.recorder = data.tokenizer, recorder
        self.options: dict[str, int] = {"max_new_tokens": section.max_new_tokens, "seed": recipe.run.seed}

    def run(self, model: nn.Module, accelerator: Accelerator, is_stopped: Callable[[], bool]) -> Metrics | None:
        """See Evaluator; there is nothing to measure of a text."""
        plain = accelerator.unwrap_model(model)
        for prompt in self.prompts:
            if is_stopped():
                return None
            text = None
            with self.recorder.failures.tolerated("sampling"):
                (text,) = sample_texts(plain, self.tokenizer, [prompt], **self.options)
            model.train()  # what has failed half-way leaves it in evaluation mode
            if text is not None:
                self.recorder.record_sample(prompt, text)
        return {}
