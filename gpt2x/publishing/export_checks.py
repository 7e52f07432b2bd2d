"""What stands against an export, told before torch is imported."""

from pathlib import Path

from gpt2x.config.publishing import ExportRecipe
from gpt2x.errors import UserError
from gpt2x.prerequisites import check_installed, check_model, model_type_of
from gpt2x.publishing.files import check_output

GGUF_TYPES = ("gpt2", "llama", "qwen3")
"""The forms that llama.cpp computes."""


def check_export(recipe: ExportRecipe) -> str:
    """The directory of the model that is exported, or its Hub id.

    Raises:
        UserError: where there is no whole model, where the form cannot hold one of its type, where something else
            is at the output, and where a library that the form needs is not installed.
    """
    if recipe.to != "native":
        check_installed(recipe.to, what=f"--to {recipe.to}")
    found = check_model(recipe.model)
    check_output(recipe.output_dir, source=found)
    if recipe.to == "gguf" and Path(found).is_dir():
        check_gguf_type(model_type_of(Path(found)))
    return found


def check_gguf_type(model_type: str) -> None:
    """Raises UserError for a type of models that GGUF cannot hold."""
    if model_type not in GGUF_TYPES:
        raise UserError(
            f"model_type ({model_type}) must be gpt2, llama or qwen3, the forms that llama.cpp computes; export to "
            f"onnx instead."
        )
