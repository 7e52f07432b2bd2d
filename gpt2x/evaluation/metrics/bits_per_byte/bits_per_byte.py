"""Bits per byte from summed losses, as a module of the evaluate library."""

import math
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """\
How many bits a language model needs for a byte of text, which compares models with different tokenizers.
"""
_INPUTS = """
Args:
    predictions: for each document its summed cross-entropy in nats, the end of text included.
    references: for each document its text.
Returns:
    bits_per_byte and num_bytes, the documents' UTF-8 bytes.
Examples:
    >>> metric = evaluate.load("gpt2x/evaluation/metrics/bits_per_byte")
    >>> round(metric.compute(predictions=[2.7725887], references=["ab"])["bits_per_byte"], 6)
    2.0
"""


class BitsPerByte(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions: list[float], references: list[str]) -> dict[str, Any]:
        num_bytes = sum(len(text.encode()) for text in references)
        return {"bits_per_byte": math.fsum(predictions) / math.log(2) / num_bytes, "num_bytes": num_bytes}
