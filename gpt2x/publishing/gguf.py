"""A stock GPT-2, Llama or Qwen3 model as one GGUF file, as llama.cpp and what is built on it read it.

The names of tensors and keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from gpt2x.errors import UserError
from gpt2x.locate import from_pretrained
from gpt2x.publishing.comparison import Difference, Reference, compare, model_logits
from gpt2x.publishing.gguf_tokenizer import add_tokenizer
from gpt2x.publishing.output import check_gguf_type

TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_ARCHITECTURES = {
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
# What llama.cpp computes, whatever the file says; it has no key for another activation.
_ACTIVATIONS = {"gpt2": ("gelu_new", "gelu_pytorch_tanh"), "llama": ("silu",), "qwen3": ("silu",)}
# Options of the stock classes that llama.cpp's have not, with the only value it computes.
_ONLY_VALUES: dict[str, dict[str, Any]] = {
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    "llama": {},
    "qwen3": {"attention_bias": False, "use_sliding_window": False},
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_YARN_KEYS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, gguf_file: Path, *, dtype: str, name: str
) -> None:
    """Writes model and tokenizer into one file.

    Args:
        model: a GPT2LMHeadModel, LlamaForCausalLM or Qwen3ForCausalLM.
        tokenizer: its byte-level BPE.
        gguf_file: the file.
        dtype: float32, float16 or q8_0; norms, biases and positions are float32 always.
        name: the model's name in the file.

    Raises:
        UserError: where GGUF or llama.cpp has no place for something in the model; it names it.
    """
    check_expressible(model.config)
    gguf_file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(gguf_file, model.config.model_type)
    quantization, file_type = TYPES[dtype]
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, model.config)
    add_tokenizer(writer, tokenizer, vocab_size=model.config.vocab_size)
    for tensor_name, tensor in tensors(model):
        kind = _type_of(tensor_name, tensor, quantization)
        writer.add_tensor(tensor_name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_expressible(config: PreTrainedConfig) -> None:
    """Raises a UserError that names what GGUF cannot hold, if there is anything."""
    model_type = config.model_type
    check_gguf_type(model_type)
    field = "activation_function" if model_type == "gpt2" else "hidden_act"
    if getattr(config, field) not in _ACTIVATIONS[model_type]:
        raise UserError(
            f"{field} ({getattr(config, field)}) must be {' or '.join(_ACTIVATIONS[model_type])} in a {model_type} "
            "model, since llama.cpp computes no other; export to onnx instead."
        )
    for field, value in _ONLY_VALUES[model_type].items():
        if getattr(config, field) != value:
            raise UserError(
                f"{field} ({getattr(config, field)}) must be {value} in a {model_type} model, since llama.cpp "
                "computes nothing else; export to onnx instead."
            )
    if model_type != "gpt2":
        _check_rope(config.rope_parameters)


def _check_rope(rope: dict[str, Any]) -> None:
    unknown = {key for key, value in rope.items() if value is not None} - _YARN_KEYS
    is_known = rope["rope_type"] in _ROPE_TYPES and not (rope["rope_type"] == "yarn" and unknown)
    if not is_known or rope.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(
            f"rope_parameters ({rope}) must be of type {', '.join(_ROPE_TYPES)}, yarn with its factor only and no "
            "part of a head left out, as llama.cpp has them; export to onnx instead."
        )


def _add_shape(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


# --------------------------------------------------------------------------------------------------------- tensors
def tensors(model: PreTrainedModel) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The weights under GGUF's names and in its layouts, float32; a tied head is left out.

    Tied is what is one tensor: a file with a head of its own keeps it, whatever its config says.
    """
    config = model.config
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = gguf.get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and is_tied:
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        yield gguf_name, _in_gguf_layout(gguf_name, tensor.float().cpu().numpy(), config)
    if config.model_type != "gpt2" and config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _rope_divisors(model)


def _in_gguf_layout(name: str, weights: NDArray[np.float32], config: PreTrainedConfig) -> NDArray[np.float32]:
    if config.model_type == "gpt2" and weights.ndim == 2 and name.startswith("blk."):
        return np.ascontiguousarray(weights.T)  # GPT-2 keeps its matrices transposed
    if config.model_type == "llama" and ".attn_q." in name:
        return _interleaved(weights, config.num_attention_heads)
    if config.model_type == "llama" and ".attn_k." in name:
        return _interleaved(weights, config.num_key_value_heads)
    return weights


def _interleaved(weights: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Reorders the rows of each head from halves, as transformers turns them, to pairs, as llama.cpp turns Llama's."""
    heads = weights.reshape(num_heads, 2, -1, *weights.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(weights.shape)


def _rope_divisors(model: PreTrainedModel) -> NDArray[np.float32]:
    """By what llama3's scaling divides each frequency."""
    frequencies = model.model.rotary_emb.inv_freq.float().cpu()
    width = model.config.head_dim
    unscaled = model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2).float() / width)
    return (unscaled / frequencies).numpy()


def _type_of(name: str, tensor: NDArray[np.float32], wanted: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """llama.cpp wants vectors and learned positions in float32; q8_0 takes rows of whole blocks only."""
    if tensor.ndim == 1 or name == "position_embd.weight":
        return gguf.GGMLQuantizationType.F32
    block_size, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if tensor.shape[-1] % block_size == 0 else gguf.GGMLQuantizationType.F16


# --------------------------------------------------------------------------------------------------------- the check
def check_gguf(gguf_file: Path, model: PreTrainedModel, reference: Reference, *, dtype: str) -> Difference:
    """Reads the file back, tensor by tensor by gguf's own reader, and as a whole by transformers' loader, which is
    compared with what the model's own files say.

    Raises:
        UserError: where a tensor or the logits differ by more than rounding.
    """
    expected = dict(tensors(model))
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        # Half precision has 11 bits; a block of q8_0 has 127 steps from 0 to its largest value.
        rounding = {gguf.GGMLQuantizationType.F32: 0.0, gguf.GGMLQuantizationType.F16: 2**-11}
        tolerance = rounding.get(tensor.tensor_type, 1 / 127) * np.abs(expected[name]).max()
        distance = np.abs(gguf.quants.dequantize(tensor.data, tensor.tensor_type) - expected[name]).max()
        if not distance <= tolerance:
            raise UserError(f"{name} differs by {distance:.2g} in the {dtype} export; export as float32.")
    # transformers reads neither Qwen3's head_dim nor GPT-2's n_positions from the file, so it is told the config.
    loaded = from_pretrained(
        AutoModelForCausalLM, gguf_file.parent, gguf_file=gguf_file.name, config=model.config, dtype=torch.float32
    )
    logits_BTV = model_logits(loaded.eval(), reference.ids, reference.mask)
    return compare(logits_BTV, reference.logits, reference.mask, dtype=dtype)
