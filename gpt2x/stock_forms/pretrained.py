"""Directories of stock models: loaded into GPT2X models, and written from them."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gpt2x.stock_forms.conversion import (
    STOCK_CLASSES,
    check_model_type,
    from_stock_config,
    from_stock_state_dict,
    to_stock_config,
    to_stock_state_dict,
)
from modeling_gpt2x.loading_gpt2x import HUB_KWARGS, load_strictly


def load_stock(
    model_class: type[PreTrainedModel], name_or_path: str | PathLike, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """A GPT2X model with the weights of a stock one, both on the CPU, and transformers' report on its loading.

    Args:
        model_class: of modeling_gpt2x, or the same from the code beside a checkpoint.
        name_or_path: of the stock model.
        kwargs: those of from_pretrained; options of GPT2XConfig may be among them.

    Raises:
        ValueError: for other model types, for options of the stock model which GPT2X lacks, and for checkpoints that
            are damaged or hold other tensors than the model.
    """
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
    hub_kwargs = {name: kwargs.pop(name) for name in HUB_KWARGS & kwargs.keys()}
    check_model_type(PreTrainedConfig.get_config_dict(name_or_path, **hub_kwargs)[0].get("model_type"))
    load = AutoModelForCausalLM.from_pretrained
    stock, _ = load_strictly(load, name_or_path, dtype=dtype, trust_remote_code=False, **hub_kwargs)
    converted = from_stock_config(stock.config)
    config, rest = model_class.config_class.from_dict(converted.to_dict(), return_unused_kwargs=True, **kwargs)
    state_dict = from_stock_state_dict(stock.state_dict(), converted)
    rest |= {"config": config, "state_dict": state_dict, "dtype": stock.dtype, "output_loading_info": True}
    model, loading = model_class.from_pretrained(None, source=name_or_path, **rest)
    model.config.name_or_path = str(name_or_path)
    if model.can_generate():
        model.generation_config = stock.generation_config
    return model, loading


def save_stock(
    model: PreTrainedModel,
    save_directory: str | PathLike,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes config.json, model.safetensors and generation_config.json of the stock class, free of our code.

    Args:
        model: a GPT2XForCausalLM.
        save_directory: where to; created if missing.
        state_dict: the whole model's weights, for a trainer that gathered them; `None` takes the model's own.
        dtype: of the weights in the file.

    Raises:
        ValueError: if no stock class expresses the model; it names the options that prevent it.
    """
    stock_config = to_stock_config(model.config)
    weights = to_stock_state_dict(model.state_dict() if state_dict is None else state_dict, model.config)
    stock_config.architectures = [STOCK_CLASSES[stock_config.model_type]]
    stock_config.dtype = dtype
    save_config(stock_config, save_directory)
    model.generation_config.save_pretrained(save_directory)
    weights = {name: weight.detach().to(dtype).contiguous() for name, weight in weights.items()}
    save_file(weights, Path(save_directory) / "model.safetensors", metadata={"format": "pt"})


def save_config(config: PreTrainedConfig, directory: str | PathLike) -> None:
    """Writes config.json, with RoPE also at its top level: transformers 4 and mistral.rs read it there only."""
    config.save_pretrained(directory)
    config_file = Path(directory) / "config.json"
    fields = json.loads(config_file.read_text(encoding="utf-8"))
    rope = fields.get("rope_parameters") or {}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            fields["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        config_file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
