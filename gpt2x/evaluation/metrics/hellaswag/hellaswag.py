"""HellaSwag's accuracies from the log-probabilities of the endings, as a module of the evaluate library."""

from typing import Any

import datasets
import evaluate
import numpy as np

_CITATION = """\
@inproceedings{zellers2019hellaswag,
  title={HellaSwag: Can a Machine Really Finish Your Sentence?},
  author={Zellers, Rowan and Holtzman, Ari and Bisk, Yonatan and Farhadi, Ali and Choi, Yejin},
  booktitle={Proceedings of the 57th Annual Meeting of the Association for Computational Linguistics},
  year={2019}
}
"""
_DESCRIPTION = """\
Accuracy of multiple choice by log-probability, as it is for HellaSwag: acc takes the ending with the largest one, \
acc_norm that with the largest one per unit of length.
"""
_INPUTS = """
Args:
    predictions: for each item the summed natural log-probabilities of its endings.
    references: for each item the place of the right ending, from 0.
    lengths: for each item the lengths of its endings: characters for the scores of lm-eval's task hellaswag, tokens
        for those of the completion style.
Returns:
    acc, acc_norm, acc_stderr, acc_norm_stderr, num_items.
Examples:
    >>> metric = evaluate.load("gpt2x/evaluation/metrics/hellaswag")
    >>> metric.compute(predictions=[[-8.0, -9.0]], references=[1], lengths=[[10, 20]])["acc_norm"]
    1.0
"""


class HellaSwag(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Value("int64"),
            "lengths": datasets.Sequence(datasets.Value("int64")),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            reference_urls=["https://arxiv.org/abs/1905.07830", "https://github.com/EleutherAI/lm-evaluation-harness"],
        )

    def _compute(
        self, predictions: list[list[float]], references: list[int], lengths: list[list[int]]
    ) -> dict[str, Any]:
        log_probs, num_units, labels = np.array(predictions), np.array(lengths), np.array(references)
        shares = {
            "acc": (log_probs.argmax(1) == labels).mean(),
            "acc_norm": ((log_probs / num_units).argmax(1) == labels).mean(),
        }
        errors = {f"{name}_stderr": _standard_error(share, len(labels)) for name, share in shares.items()}
        return {name: float(value) for name, value in (shares | errors).items()} | {"num_items": len(labels)}


def _standard_error(share: float, count: int) -> float:
    return float(np.sqrt(share * (1 - share) / (count - 1))) if count > 1 else float("nan")
