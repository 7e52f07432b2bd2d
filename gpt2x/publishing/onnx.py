"""A decoder as one ONNX file that ONNX Runtime, transformers.js and optimum-style readers run as it is.

The file takes `input_ids` (B, T), `attention_mask` (B, S + T), `position_ids` (B, T) and `past_key_values.N.key/value`
(B, H, S, D) and gives `logits` (B, T, V) and `present.N.key/value` (B, H, S + T, D): one file for the prompt, with
S = 0, and for every step after it. transformers' own exporter gives two files with names that these readers do not
know, so a module with this signature goes to `torch.onnx.export`.

Shapes: B sequences, T new tokens, S tokens in the cache, H heads, D width of a head, V vocabulary.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from gpt2x.errors import UserError
from gpt2x.publishing.comparison import Difference, Reference, compare, sample_batch
from gpt2x.publishing.onnx_decoder import FILES, OnnxDecoder
from gpt2x.publishing.onnx_readers import write_configs

# LayerNormalization came with 17; what came later helps none of these models and shuts out older runtimes.
OPSET = 18
# A protobuf file ends at 2 GiB; beyond, the weights go beside it, by the name that transformers.js looks for.
LARGEST_FILE = 2_000_000_000
_TOTAL_LENGTH = "past_sequence_length + sequence_length"


def write_onnx(model: PreTrainedModel, directory: Path, *, dtype: str) -> Path:
    """Writes `onnx/model.onnx` (or its float16 or int8 sibling) and the configurations that its readers look for.

    Args:
        model: any causal language model with a key-value cache, in float32.
        directory: where to write; the tokenizer is the caller's.
        dtype: float32, float16, or int8: the linear layers' weights in 8 bits, their inputs quantized as they come.

    Returns:
        The ONNX file.

    Raises:
        UserError: where the model's RoPE depends on the length of the text.
    """
    _check_exportable(model.config)
    onnx_file = directory / "onnx" / FILES[dtype]
    onnx_file.parent.mkdir(parents=True, exist_ok=True)
    graph_model = export_graph(model.half() if dtype == "float16" else model)
    if dtype == "int8":
        graph_model = _quantized(graph_model, onnx_file.with_name("float32.onnx"))
    _save(graph_model, onnx_file)
    write_configs(model, graph_model.graph, onnx_file)
    return onnx_file


def check_onnx(directory: Path, reference: Reference, *, dtype: str) -> Difference:
    """Runs the written file on ONNX Runtime, by a prompt and single steps from its cache, and compares it with what
    the model's own files say.

    Raises:
        UserError: where the logits differ by more than rounding.
    """
    ids_BT, mask_BT = reference.ids.numpy(), reference.mask.numpy()
    logits_BTV = _stepped_logits(OnnxDecoder(directory, dtype=dtype), ids_BT, mask_BT)
    return compare(logits_BTV, reference.logits, reference.mask, dtype=dtype)


def _stepped_logits(
    decoder: OnnxDecoder, ids_BT: NDArray[np.int64], mask_BT: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Logits (B, T, V) of a prompt of half the tokens and of one step for each of the others."""
    cache, pieces, end = decoder.empty_cache(len(ids_BT)), [], 0
    for start in [0, *range(ids_BT.shape[1] // 2, ids_BT.shape[1])]:
        end = start + 1 if start else ids_BT.shape[1] // 2
        logits, cache = decoder.step(ids_BT[:, start:end], mask_BT[:, :end], cache)
        pieces.append(logits)
    return np.concatenate(pieces, axis=1)


def _check_exportable(config: PreTrainedConfig) -> None:
    rope_type = (config.to_dict().get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise UserError(
            f"rope_type ({rope_type}) changes the angles with the text's length, which an ONNX graph cannot; "
            "export a model whose rope_type is default, linear, llama3 or yarn."
        )


# ------------------------------------------------------------------------------------------------------- the graph
class _DecoderWithCache(torch.nn.Module):
    """A causal language model whose cache is plain tensors in and out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        # Every layer keeps the whole past, sliding ones too: a cache cut to the window has another length per layer.
        cache = DynamicCache(ddp_cache_data=list(zip(past[::2], past[1::2])))
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        # float32 whatever the weights are: JavaScript has no sampler for half precision.
        return output.logits.float(), *_tensors(output.past_key_values)


def _tensors(cache: DynamicCache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def export_graph(model: PreTrainedModel) -> onnx_ir.Model:
    """The ONNX model of a decoder, batch and lengths free, in the model's own dtype."""
    attention = model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")  # plain products and a softmax, which every runtime has kernels for
    try:
        arguments, dynamic_shapes = _example(model)
        num_layers = len(arguments[3]) // 2
        cache_names = [f"past_key_values.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]
        with torch.no_grad(), _quiet_export():
            program = torch.onnx.export(
                _DecoderWithCache(model).eval(),
                arguments,
                input_names=["input_ids", "attention_mask", "position_ids", *cache_names],
                output_names=["logits", *(name.replace("past_key_values", "present") for name in cache_names)],
                dynamic_shapes=dynamic_shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        model.set_attn_implementation(attention)
    assert program is not None
    _name_axes(program.model.graph)
    _forget_sources(program.model.graph)
    return program.model


def _example(model: PreTrainedModel) -> tuple[tuple, tuple]:
    """Arguments to trace with, and which of their axes are free.

    No axis has length 1, and no two have the same: torch.export would take them for constants, or for one axis. A
    row of padding keeps the mask in the graph.
    """
    ids_BT, mask_BT = sample_batch(model.config, num_tokens=7)
    with torch.no_grad():
        past = _tensors(model(input_ids=ids_BT[:, :4], use_cache=True).past_key_values)
    position_ids = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, 4:]
    free = torch.export.Dim.DYNAMIC
    dynamic_shapes = (*[{0: free, 1: free}] * 3, [{0: free, 2: free}] * len(past))
    return (ids_BT[:, 4:], mask_BT, position_ids, past), dynamic_shapes


@contextmanager
def _quiet_export() -> Iterator[None]:
    """torch.onnx warns of its own deprecations, and of torchvision, which no text model needs."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)


def _name_axes(graph: onnx_ir.Graph) -> None:
    """Names the free axes of inputs and outputs as readers show them; inside, the tracer's names stay."""
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        assert value.name is not None
        if len(value.shape) == 4:
            length = "past_sequence_length" if value.name.startswith("past") else _TOTAL_LENGTH
            axes = ["batch_size", value.shape[1], length, value.shape[3]]
        else:
            length = _TOTAL_LENGTH if value.name == "attention_mask" else "sequence_length"
            axes = ["batch_size", length, *value.shape[2:]]
        value.shape = onnx_ir.Shape(axes)


def _forget_sources(graph: onnx_ir.Graph) -> None:
    """Removes the tracer's notes: stack traces with this machine's paths, larger than a small model's weights."""
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


# ---------------------------------------------------------------------------------------------------------- files
def _quantized(graph_model: onnx_ir.Model, scratch_file: Path) -> onnx_ir.Model:
    """The model with the weights of its linear layers in 8 bits, one scale per output."""
    _fold_transposes(graph_model.graph)
    # What onnxruntime's own preprocessing leaves behind; without it, quantizing warns on the root logger.
    graph_model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"
    _save(graph_model, scratch_file)
    quantized_file = scratch_file.with_name("quantized.onnx")
    quantize_dynamic(
        scratch_file,
        quantized_file,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        # Unsigned: signed weights saturate on processors without VNNI (onnxruntime's documentation, "U8S8").
        weight_type=QuantType.QUInt8,
        use_external_data_format=scratch_file.with_name(_data_name(scratch_file)).exists(),
        extra_options={"MatMulConstBOnly": True},
    )
    quantized = onnx_ir.load(quantized_file)
    onnx_ir.external_data.load_to_model(quantized)
    for file in scratch_file.parent.glob("*"):
        if file.name.split(".")[0] in ("float32", "quantized"):
            file.unlink()
    return quantized


def _fold_transposes(graph: onnx_ir.Graph) -> None:
    """Stores a head that the graph would transpose as its product wants it; only constants are quantized."""
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        name = f"{weight.name}.transposed"
        tensor = onnx_ir.tensor(np.ascontiguousarray(weight.const_value.numpy().T), name=name)
        folded = onnx_ir.val(name, const_value=tensor)
        graph.register_initializer(folded)
        node.outputs[0].replace_all_uses_with(folded)
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[weight.name]


def _save(graph_model: onnx_ir.Model, onnx_file: Path) -> None:
    weights = sum(value.const_value.nbytes for value in graph_model.graph.initializers.values())
    beside = _data_name(onnx_file) if weights > LARGEST_FILE else None
    onnx_ir.save(graph_model, onnx_file, external_data=beside)


def _data_name(onnx_file: Path) -> str:
    return f"{onnx_file.name}_data"
