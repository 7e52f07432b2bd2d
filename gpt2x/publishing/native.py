"""gpt2x's own form: the model with its code, as any process with transformers loads it by trust_remote_code."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from gpt2x.locate import from_pretrained
from gpt2x.publishing.comparison import Difference, compare, model_logits, sample_batch
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


def check_native(directory: Path, model: PreTrainedModel, *, dtype: str) -> Difference:
    """Loads what was written, in float32, and compares it with the model it came from.

    Raises:
        UserError: where the logits differ by more than rounding.
    """
    loaded = from_pretrained(GPT2XForCausalLM, directory, dtype=torch.float32).eval()
    ids_BT, mask_BT = sample_batch(model)
    logits_BTV, expected_BTV = (model_logits(each, ids_BT, mask_BT) for each in (loaded, model))
    return compare(logits_BTV, expected_BTV, mask_BT, dtype=dtype)
