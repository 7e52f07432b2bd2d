"""What a model is worth: validation on held-out documents, and samples."""

from gpt2x.evaluation.samples import sample_texts, stream_text
from gpt2x.evaluation.validation import Validation, validate

__all__ = ["Validation", "sample_texts", "stream_text", "validate"]
