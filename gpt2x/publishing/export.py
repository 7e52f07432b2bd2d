"""One model to one form: written beside its place, compared with the original, and only then there."""

from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2x.adapters import whole_model
from gpt2x.config.publishing import ExportRecipe
from gpt2x.locate import from_pretrained, local_path
from gpt2x.models import load_for_inference
from gpt2x.publishing.comparison import Difference, Reference, compare, model_logits
from gpt2x.publishing.output import check_export, size_bytes, whole_or_nothing
from gpt2x.runs.layout import name_of
from gpt2x.tokenizers.bpe import load_tokenizer, write_tokenizer
from modeling_gpt2x import GPT2XForCausalLM

# Model types that transformers.js loads by name.
_JAVASCRIPT_TYPES = ("gpt2", "llama", "qwen3", "nanochat")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    path: Path
    """The model file, or the directory of the native form."""
    num_bytes: int
    """Its size."""
    difference: Difference
    """How far it is from the original."""
    note: str | None = None
    """What its user should know."""


def export_model(recipe: ExportRecipe) -> Export:
    """Exports a model; adapters are merged into their base.

    Raises:
        UserError: where there is no whole model, where the form cannot hold it, where the result computes something
            else, where it cannot be written, and where a library that the form needs is not installed.
    """
    exporters = {"native": _export_native, "onnx": _export_onnx, "gguf": _export_gguf}
    with whole_model(check_export(recipe)) as directory:
        return exporters[recipe.to](recipe, directory)


def _export_native(recipe: ExportRecipe, directory: str) -> Export:
    reference = Reference.read(directory)
    with whole_or_nothing(recipe.output_dir) as partial:
        write_tokenizer(load_tokenizer(directory), partial)
        write_native(load_native(directory), partial, dtype=recipe.dtype)
        difference = check_native(partial, reference, dtype=recipe.dtype)
        num_bytes = size_bytes(partial, "*.safetensors")
    return Export(path=recipe.output_dir, num_bytes=num_bytes, difference=difference)


def _export_onnx(recipe: ExportRecipe, directory: str) -> Export:
    from gpt2x.publishing.onnx import check_onnx, write_onnx

    reference = Reference.read(directory)
    with whole_or_nothing(recipe.output_dir) as partial:
        write_tokenizer(load_tokenizer(directory), partial)
        model = load_for_inference(directory, dtype=torch.float32)
        onnx_file = write_onnx(model, partial, dtype=recipe.dtype)
        difference = check_onnx(partial, reference, dtype=recipe.dtype)
        num_bytes = size_bytes(partial, f"onnx/{onnx_file.name}*")
    model_type = model.config.model_type
    note = None
    if model_type not in _JAVASCRIPT_TYPES:
        note = f"transformers.js does not know {model_type}; ONNX Runtime runs it in every language"
    path = recipe.output_dir / "onnx" / onnx_file.name
    return Export(path=path, num_bytes=num_bytes, difference=difference, note=note)


def _export_gguf(recipe: ExportRecipe, directory: str) -> Export:
    from gpt2x.publishing.gguf import check_expressible, check_gguf, write_gguf

    reference = Reference.read(directory)
    model = load_for_inference(directory, dtype=torch.float32)
    check_expressible(model.config)
    name = model_name(recipe.model)
    with whole_or_nothing(recipe.output_dir) as partial:
        gguf_file = partial / f"{name}-{recipe.dtype}.gguf"
        write_gguf(model, load_tokenizer(directory), gguf_file, dtype=recipe.dtype, name=name)
        difference = check_gguf(gguf_file, model, reference, dtype=recipe.dtype)
    path = recipe.output_dir / gguf_file.name
    return Export(path=path, num_bytes=path.stat().st_size, difference=difference)


def model_name(model: str) -> str:
    """What to call a model: a run's name for its directory and those inside it, else the last part of the path."""
    path = local_path(model).resolve() if local_path(model).exists() else Path(model)
    return name_of(path)


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
