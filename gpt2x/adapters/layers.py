"""Adapters in the layers of a model."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gpt2x.config import LoraSection
from gpt2x.distributed.devices import forked_rng
from gpt2x.errors import UserError
from gpt2x.prerequisites import check_installed

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR = "all-linear"


def add_adapters(model: PreTrainedModel, section: LoraSection, *, seed: int) -> "PeftModel":
    """Freezes a model and adds adapters in float32, which change nothing until they are trained.

    Args:
        model: the base, as load_base returns it; changed in place.
        section: rank, scale, dropout and places of the adapters.
        seed: of their random half; torch's own random state is left as it was.

    Raises:
        UserError: where peft is not installed, or an adapter has no place in the model.
    """
    check_installed("peft", what="lora")
    from peft import LoraConfig, TaskType, get_peft_model

    targets = _target_modules(model, section.target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in _linear_layers(model).values()),
    )
    with forked_rng(model.device), peft_warnings_ignored():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """Of these none is for the user: peft asks transformers by an old name, and corrects fan_in_fan_out by layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        yield


def _target_modules(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The last parts of the names of the layers that get adapters, sorted.

    Raises:
        UserError: for a name that no linear layer has, and for a head that is the embeddings too.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    linear = {name.rpartition(".")[2] for name in _linear_layers(model)}
    head = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    wanted = set(names or DEFAULTS.get(model.config.model_type, [ALL_LINEAR]))
    if ALL_LINEAR in wanted:
        wanted = wanted - {ALL_LINEAR} | linear
    if model.config.tie_word_embeddings and wanted & head:
        raise UserError(
            f"lora.target_modules ({min(wanted & head)}) must not have the head where it is tied to the embeddings, "
            f"as in {model.name_or_path}; choose from {', '.join(sorted(linear))}."
        )
    unknown = wanted - linear - head
    if unknown:
        raise UserError(
            f"lora.target_modules ({min(unknown)}) must be linear layers of {model.name_or_path}: choose from "
            f"{', '.join(sorted(linear))}, or leave it out."
        )
    return sorted(wanted)


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """By name, without the head."""
    head = model.get_output_embeddings()
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, (nn.Linear, Conv1D)) and module is not head}


def adapter_weights(model: "PeftModel") -> dict[str, Tensor]:
    """The very tensors of the adapters, by their names in adapter_model.safetensors."""
    from peft import get_peft_model_state_dict

    # without False peft asks the Hub whether the base there has as many embeddings
    return get_peft_model_state_dict(model, save_embedding_layers=False)
