"""What readers look for beside an ONNX file: transformers.js in config.json, onnxruntime-genai in its own file."""

import json
from pathlib import Path
from typing import Any

import onnx_ir
from transformers import PreTrainedModel

from gpt2x.publishing.onnx_decoder import FILES
from gpt2x.stock_forms import save_config

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")


def write_configs(model: PreTrainedModel, graph: onnx_ir.Graph, onnx_file: Path) -> None:
    """Writes config.json, generation_config.json and genai_config.json above the directory of the file.

    Args:
        model: what was exported.
        graph: of the file, for the shape of its cache.
        onnx_file: the file, which is there; genai_config.json names one file, the latest that was exported.
    """
    directory = onnx_file.parent.parent
    save_config(model.config, directory)
    model.generation_config.save_pretrained(directory)
    _describe_to_transformers_js(directory)
    settings = _genai_config(model, graph, str(onnx_file.relative_to(directory)))
    (directory / "genai_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _describe_to_transformers_js(directory: Path) -> None:
    """Adds to config.json what transformers.js cannot see in the file: the cache's type, and weights beside it."""
    config_file = directory / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["transformers.js_config"] = {"kv_cache_dtype": {"fp16": "float16"}}
    beside = {name: 1 for name in FILES.values() if (directory / "onnx" / f"{name}_data").exists()}
    if beside:
        config["transformers.js_config"]["use_external_data_format"] = beside
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _genai_config(model: PreTrainedModel, graph: onnx_ir.Graph, filename: str) -> dict[str, Any]:
    """onnxruntime-genai's description of a decoder, whatever its form: names of inputs and outputs, and the cache."""
    config, generation = model.config, model.generation_config
    keys = [value for value in graph.inputs if str(value.name).endswith(".key")]
    assert keys[0].shape is not None
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    tokens = {
        "bos_token_id": generation.bos_token_id,
        "eos_token_id": generation.eos_token_id,
        "pad_token_id": ends[0] if generation.pad_token_id is None else generation.pad_token_id,
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": keys[0].shape[1],
        "head_size": keys[0].shape[3],
        "num_hidden_layers": len(keys),
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    length = config.max_position_embeddings
    sampling = {name: getattr(generation, name) for name in _SAMPLING}
    return {
        "model": {
            "type": "decoder",
            "context_length": length,
            "vocab_size": config.vocab_size,
            **{name: value for name, value in tokens.items() if value is not None},
            "decoder": decoder,
        },
        "search": {
            "max_length": length,
            "past_present_share_buffer": False,  # the cache grows: what comes out is longer than what goes in
            **{name: value for name, value in sampling.items() if value is not None},
        },
    }
