"""Adapters and their base as one model, for what reads whole models only."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gpt2x.adapters.files import ADAPTER_CONFIG, save_merged
from gpt2x.adapters.layers import peft_warnings_ignored
from gpt2x.locate import base_of
from gpt2x.models import load_for_inference
from gpt2x.prerequisites import check_installed
from gpt2x.tokenizers.bpe import load_tokenizer


@contextmanager
def whole_model(directory: str) -> Iterator[str]:
    """Yields a model's directory or Hub id as it is, and of adapters a temporary one with the model they make.

    Raises:
        UserError: where the base of adapters is not there, or peft is not installed.
    """
    adapter_config = Path(directory) / ADAPTER_CONFIG
    if not adapter_config.is_file():
        yield directory
        return
    check_installed("peft", what=f"{directory} holds adapters, and reading them")
    from peft import PeftModel

    base = base_of(Path(directory))
    with tempfile.TemporaryDirectory() as merged_dir, peft_warnings_ignored():
        model = PeftModel.from_pretrained(load_for_inference(base, dtype=torch.float32), directory)
        save_merged(model, Path(merged_dir), load_tokenizer(directory))
        yield merged_dir
