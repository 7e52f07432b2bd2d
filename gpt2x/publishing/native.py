"""gpt2x's own form: the model with its code, as any process with transformers loads it by trust_remote_code."""

from pathlib import Path

import torch

from gpt2x.locate import from_pretrained
from gpt2x.publishing.comparison import Difference, compare, model_logits
from gpt2x.publishing.reference import Reference
from modeling_gpt2x import GPT2XForCausalLM


def load_native(name_or_path: str) -> GPT2XForCausalLM:
    """A model of gpt2x's form or of one of the stock forms that it converts, in float32.

    Raises:
        UserError: where it is neither.
    """
    return from_pretrained(GPT2XForCausalLM, name_or_path, dtype=torch.float32).eval()


def write_native(model: GPT2XForCausalLM, directory: Path, *, dtype: str) -> None:
    """Writes weights, config and code; the tokenizer is the caller's."""
    model.to(getattr(torch, dtype)).save_pretrained(directory)


def check_native(directory: Path, reference: Reference, *, dtype: str) -> Difference:
    """Loads what was written, in float32, and compares it with what the model's own files say.

    Raises:
        UserError: where the logits differ by more than rounding.
    """
    loaded = from_pretrained(GPT2XForCausalLM, directory, dtype=torch.float32).eval()
    logits_BTV = model_logits(loaded, reference.ids, reference.mask)
    return compare(logits_BTV, reference.logits, reference.mask, dtype=dtype)
