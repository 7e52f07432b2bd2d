"""Adapters as files: by themselves, and merged into the stock model."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gpt2x.adapters.layers import adapter_weights
from gpt2x.errors import UserError
from gpt2x.shards.tokenizer import write_tokenizer

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's for the only adapter of a model


def save_adapters(
    model: "PeftModel",
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> str:
    """Writes adapters and tokenizer as PeftModel.from_pretrained reads them, with the base's path or id.

    Args:
        model: as add_adapters returned it.
        directory: where to; created if missing.
        tokenizer: the base's, or one of as many tokens.
        weights: the adapters' by name, where they are not taken from the model itself.

    Returns:
        The model_type of the base.
    """
    write_tokenizer(tokenizer, directory)
    tensors = dict(adapter_weights(model) if weights is None else weights)
    metadata = {"format": "pt", "base_fingerprint": _base_fingerprint(model)}
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata=metadata)
    config = _lora_config(model).to_dict() | {"inference_mode": True}
    # peft keeps names in sets, whose order is another in every process
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return model.config.model_type


def load_adapters(model: "PeftModel", directory: Path) -> None:
    """Reads what save_adapters wrote into adapters of the same shape on the same base.

    Raises:
        UserError: where they are of another shape or base.
    """
    saved, own = load_file(directory / ADAPTER_WEIGHTS), adapter_weights(model)
    for name in sorted({*saved, *own}):
        there, here = (tuple(tensors[name].shape) if name in tensors else None for tensors in (saved, own))
        if there != here:
            raise UserError(
                f"the adapters of {directory} are not those of this recipe: {name} is {_shape(there)} there and "
                f"{_shape(here)} here; set lora.rank and lora.target_modules back, or start a new run with "
                f"--run.name NAME."
            )
    with safe_open(directory / ADAPTER_WEIGHTS, "pt") as file:
        fingerprint = (file.metadata() or {}).get("base_fingerprint")
    if fingerprint != _base_fingerprint(model):
        raise UserError(
            f"init_from ({_lora_config(model).base_model_name_or_path}) is not what the adapters of {directory} were "
            f"trained on; give the model that they belong to, or start a new run with --run.name NAME."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


def _base_fingerprint(model: "PeftModel") -> str:
    """The sha256 of the beginning of every frozen parameter: another step of the same run differs in all of them."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            digest.update(parameter.detach().flatten()[:1024].cpu().numpy().tobytes())
    return digest.hexdigest()


def _lora_config(model: "PeftModel") -> "LoraConfig":
    return cast(Any, model.peft_config[_NAME])


def save_merged(model: "PeftModel", directory: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Writes the stock model with the adapters added to its weights, in float32; the model itself stays as it is.

    Returns:
        Its model_type.
    """
    write_tokenizer(tokenizer, directory)
    base = model.get_base_model()
    base.save_pretrained(directory, state_dict=merged_weights(model))
    return base.config.model_type


def merged_weights(model: "PeftModel") -> dict[str, Tensor]:
    """The state dict of the stock model with the adapters added: sums where they are, else the base's own tensors."""
    from peft.tuners.lora import LoraLayer

    base, tensors = model.get_base_model(), {}
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    inside = tuple(f"{name}." for name in layers)
    with torch.no_grad():
        for name, tensor in base.state_dict().items():
            if not name.startswith(inside):
                tensors[name] = tensor
        for name, layer in layers.items():
            for part, tensor in layer.get_base_layer().state_dict().items():
                is_adapted = part == "weight"
                tensors[f"{name}.{part}"] = tensor + layer.get_delta_weight(_NAME) if is_adapted else tensor
    return tensors
