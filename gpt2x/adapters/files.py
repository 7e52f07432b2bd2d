"""Adapters as files: by themselves, merged into the stock model, and as a whole model for what reads those only."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gpt2x.adapters.lora import adapter_weights, peft_warnings_ignored
from gpt2x.errors import UserError
from gpt2x.locate import base_of
from gpt2x.models import load_for_inference
from gpt2x.prerequisites import check_installed
from gpt2x.stock_forms import save_config
from gpt2x.tokenizers.bpe import load_tokenizer, write_tokenizer

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's for the only adapter of a model
_known_bases: WeakKeyDictionary["PeftModel", str] = WeakKeyDictionary()


def save_adapters(
    model: "PeftModel",
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> str:
    """Writes adapters and tokenizer as AutoPeftModel reads them anywhere, with the base's absolute path or Hub id.

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
    metadata = {"format": "pt", "base_sha256": _base_sha256(model)}
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata=metadata)
    _sort_metadata(directory / ADAPTER_WEIGHTS)
    base = _lora_config(model).base_model_name_or_path
    # A relative path would be looked for wherever peft is started.
    base = str(Path(base).resolve()) if base is not None and Path(base).is_dir() else base
    config = _lora_config(model).to_dict() | {"inference_mode": True, "base_model_name_or_path": base}
    # peft keeps names in sets, whose order is another in every process
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return model.config.model_type


def _sort_metadata(file: Path) -> None:
    """Makes the same adapters the same bytes: safetensors writes two metadata in an order that changes by chance."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        stream.seek(8)
        stream.write(text)


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
    if not _is_base_of(directory / ADAPTER_WEIGHTS, model):
        raise UserError(
            f"init_from ({_lora_config(model).base_model_name_or_path}) is not what the adapters of {directory} were "
            f"trained on; give the model that they belong to, or start a new run with --run.name NAME."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


def _is_base_of(adapters: Path, model: "PeftModel") -> bool:
    """Whether a file of adapters names the base that the model has."""
    with safe_open(adapters, "pt") as file:
        metadata = file.metadata() or {}
    if "base_sha256" in metadata:
        return metadata["base_sha256"] == _base_sha256(model)
    return metadata.get("base_fingerprint") == _beginnings_sha256(model)


def _base_sha256(model: "PeftModel") -> str:
    """The sha256 of every number of the base, its frozen parameters.

    The first call for a model reads all of it, a gigabyte in one to two seconds (a billion parameters: four to eight),
    tensor by tensor through host memory where it is on a GPU. What is frozen is not read again at later saves.
    """
    if model not in _known_bases:
        digest = hashlib.sha256()
        for parameter in _base_parameters(model):
            digest.update(f"{tuple(parameter.shape)}".encode())
            digest.update(parameter.flatten().cpu().view(torch.uint8).numpy().data)
        _known_bases[model] = digest.hexdigest()
    return _known_bases[model]


def _beginnings_sha256(model: "PeftModel") -> str:
    """What adapters of gpt2x before ``base_sha256`` say of their base: the first 1,024 numbers of every parameter."""
    digest = hashlib.sha256()
    for parameter in _base_parameters(model):
        digest.update(parameter.flatten()[:1024].cpu().numpy().tobytes())
    return digest.hexdigest()


def _base_parameters(model: "PeftModel") -> Iterator[Tensor]:
    return (parameter.detach() for parameter in model.parameters() if not parameter.requires_grad)


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
    save_config(base.config, directory)
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
