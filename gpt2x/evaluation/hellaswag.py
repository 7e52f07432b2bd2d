"""HellaSwag (arXiv:1905.07830): which of four endings a model finds likeliest."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.evaluation.continuations import (
    Question,
    check_lengths,
    encode,
    encode_questions,
    fitting_batch_size,
    score_continuations,
)
from gpt2x.evaluation.hellaswag_items import (
    NUM_VALIDATION_ITEMS,
    HellaSwagItem,
    Style,
    item_texts,
)


@dataclass(frozen=True, kw_only=True)
class HellaSwag:
    """What a model makes of HellaSwag's items.

    Attributes:
        style: ``hellaswag`` (lm-eval's) or ``hellaswag_completion`` (llm.c's); their figures do not compare.
        acc: share of items whose right ending has the largest probability.
        acc_norm: share of items whose right ending has the largest log-probability per character (``hellaswag``) or
            per token (``hellaswag_completion``).
        acc_stderr: standard error of acc.
        acc_norm_stderr: standard error of acc_norm.
        num_items: how many items.
        log_probs: (num_items, 4) float64, the endings' summed log-probabilities.
        lengths: (num_items, 4), what acc_norm divides by.
    """

    style: Style
    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float
    num_items: int
    log_probs: np.ndarray
    lengths: np.ndarray

    @property
    def name(self) -> str:
        """The style, and the number of items where it is not that of the whole validation split."""
        return self.style if self.num_items == NUM_VALIDATION_ITEMS else f"{self.style}_{self.num_items}_items"

    def metrics(self) -> dict[str, float]:
        """The record of metrics.jsonl; a part of the items has the keys of the whole, and says how many they are."""
        fields = ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr")
        metrics = {f"{self.style}/{field}": getattr(self, field) for field in fields}
        return metrics | {f"{self.style}/items": self.num_items}


@dataclass(frozen=True, kw_only=True)
class HellaSwagQuestions:
    """Items as a tokenizer writes them, for any number of evaluations.

    Attributes:
        style: lm-eval's or the completion style.
        questions: their tokens.
        lengths: (num_items, 4), what acc_norm divides by.
        labels: the places of the right endings.
    """

    style: Style
    questions: Sequence[Question]
    lengths: np.ndarray
    labels: Sequence[int]

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, items: Sequence[HellaSwagItem], style: Style = "hellaswag"
    ) -> "HellaSwagQuestions":
        """Encodes the items."""
        questions = encode_items(tokenizer, items, style)
        if style == "hellaswag":
            lengths = [[len(ending) for ending in item_texts(item, style)[1]] for item in items]
        else:
            lengths = [[len(ids) for ids in question.continuations] for question in questions]
        labels = [item.label for item in items]
        return cls(style=style, questions=questions, lengths=np.array(lengths), labels=labels)

    @property
    def num_tokens(self) -> list[int]:
        """Of each item in a forward pass, at most."""
        return [question.num_tokens for question in self.questions]

    def items_per_pass(self, device: torch.device) -> int:
        """How many suit a device."""
        return fitting_batch_size(self.questions, device)

    def check(self, model: PreTrainedModel) -> None:
        """Raises UserError where an ending is longer than what the model takes."""
        check_lengths(model, self.questions, name="HellaSwag")


def encode_items(tokenizer: PreTrainedTokenizerBase, items: Sequence[HellaSwagItem], style: Style) -> list[Question]:
    """Token ids of contexts and endings: encoded together in ``hellaswag``, apart in ``hellaswag_completion``."""
    texts = [item_texts(item, style) for item in items]
    spaced = [(context, [f" {ending}" for ending in endings]) for context, endings in texts]
    if style == "hellaswag":
        return encode_questions(tokenizer, spaced)
    contexts = encode(tokenizer, [context for context, _ in spaced])
    endings = iter(
        encode(tokenizer, [ending for _, endings in spaced for ending in endings], add_special_tokens=False)
    )
    return [
        Question(context=ids, continuations=[next(endings) for _ in item_endings])
        for ids, (_, item_endings) in zip(contexts, spaced, strict=True)
    ]


def evaluate_hellaswag(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[HellaSwagItem],
    *,
    style: Style = "hellaswag",
    batch_size: int | None = None,
    accelerator: Accelerator | None = None,
) -> HellaSwag:
    """Scores every ending of every item, without examples before it (zero-shot).

    Args:
        model: a causal language model of transformers, plain or prepared by the accelerator; left as it was.
        tokenizer: its tokenizer.
        items: the same on all ranks.
        style: lm-eval's or the completion style.
        batch_size: items of a forward pass, on which the result does not depend; None for what suits the device.
        accelerator: splits the items over its ranks, which all get the whole result.
    """
    questions = HellaSwagQuestions.of(tokenizer, items, style)
    scores = score_hellaswag(model, questions, batch_size=batch_size, accelerator=accelerator)
    assert scores is not None
    return scores


def score_hellaswag(
    model: nn.Module,
    questions: HellaSwagQuestions,
    *,
    batch_size: int | None = None,
    accelerator: Accelerator | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> HellaSwag | None:
    """evaluate_hellaswag with items that are encoded; is_stopped and None as in score_continuations."""
    questions.check(model if accelerator is None else accelerator.unwrap_model(model))
    scores = score_continuations(
        model,
        questions.questions,
        batch_size=batch_size or questions.items_per_pass(next(model.parameters()).device),
        accelerator=accelerator,
        is_stopped=is_stopped,
    )
    return None if scores is None else _result(torch.stack([each.log_probs for each in scores]), questions)


def _result(scores: Tensor, questions: HellaSwagQuestions) -> HellaSwag:
    log_probs, lengths, labels = scores.numpy(), questions.lengths, questions.labels
    acc = float((log_probs.argmax(1) == labels).mean())
    acc_norm = float(((log_probs / lengths).argmax(1) == labels).mean())
    return HellaSwag(
        style=questions.style,
        acc=acc,
        acc_norm=acc_norm,
        acc_stderr=_standard_error(acc, len(labels)),
        acc_norm_stderr=_standard_error(acc_norm, len(labels)),
        num_items=len(labels),
        log_probs=log_probs,
        lengths=lengths,
    )


def _standard_error(share: float, count: int) -> float:
    """Of a mean of zeros and ones, by the sample's standard deviation; not a number for a single one."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan


def result_record(precision: str, result: HellaSwag) -> tuple[str, dict[str, Any]]:
    """(name, figures) for a run's stats.json; the name tells the precision where it is not float32."""
    name = result.name if precision == "float32" else f"{result.name}_{precision}"
    fields = ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "num_items")
    figures = {field: getattr(result, field) for field in fields}
    return name, {field: None if math.isnan(figure) else figure for field, figure in figures.items()}


def print_scores(results: Mapping[str, HellaSwag], num_bytes: Mapping[str, int]) -> None:
    """Prints a line per precision: name, items, scores with standard errors, and the size of the weights.

    Below the first line each is followed by what changed against the first.
    """
    first_precision, first = next(iter(results.items()))
    print(f"{first.name}: {first.num_items} items, zero-shot")
    print(f"{'':10s} {'acc':>17s} {'acc_norm':>17s} {'weights':>12s}")
    for precision, result in results.items():
        acc = f"{result.acc:.4f} ± {result.acc_stderr:.4f}"
        acc_norm = f"{result.acc_norm:.4f} ± {result.acc_norm_stderr:.4f}"
        print(f"{precision:10s} {acc:>17s} {acc_norm:>17s} {num_bytes[precision] / 1e6:9,.1f} MB")
        if precision != first_precision:
            same = (result.log_probs.argmax(1) == first.log_probs.argmax(1)).mean()
            changes = f"{result.acc - first.acc:+.4f}", f"{result.acc_norm - first.acc_norm:+.4f}"
            print(f"{'':10s} {changes[0]:>17s} {changes[1]:>17s}   the same ending in {same:.1%} of the items")
