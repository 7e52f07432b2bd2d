"""What scripts/export.py and scripts/push_to_hub.py run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2x.config.checks import Seconds, check_numbers

DTYPES = {
    "native": ("float32", "bfloat16", "float16"),
    "onnx": ("float32", "float16", "int8"),
    "gguf": ("float32", "float16", "q8_0"),
}


@dataclass(frozen=True, kw_only=True)
class ExportRecipe:
    """Writes a model in another form, and compares it with the original before it says so."""

    model: str = "runs/quickstart"
    """Directory or Hub id of a model, or the directory of a run."""
    to: Literal["native", "onnx", "gguf"]
    """gpt2x's own form with its code; ONNX for ONNX Runtime and transformers.js; GGUF for llama.cpp."""
    dtype: Literal["float32", "bfloat16", "float16", "int8", "q8_0"] = "float32"
    """Type of the weights: bfloat16 is native's, int8 (linear layers only) is ONNX's, q8_0 is GGUF's."""
    output: Path | None = None
    """Directory to write to; by default exports/FORM in the directory of the model or run."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES[self.to]:
            raise ValueError(f"dtype ({self.dtype}) must be one of {', '.join(DTYPES[self.to])} with --to {self.to}.")

    @property
    def output_dir(self) -> Path:
        """Where the export goes."""
        if self.output is not None:
            return self.output
        model = Path(self.model).expanduser()
        home = model if model.is_dir() else Path("exports") / model.name
        return home / "exports" / self.to if model.is_dir() else home / self.to


@dataclass(frozen=True, kw_only=True)
class PushRecipe:
    """Uploads a model and its card to the Hub, as the user of HF_TOKEN or of `hf auth login`."""

    model: str = "runs/quickstart"
    """Directory of a model or of a run."""
    repo_id: str
    """The repository, USER/NAME; made where it is not there."""
    public: bool = False
    """Whether a new repository is visible to everyone."""
    license: str | None = None
    """The model's licence, an identifier that the Hub knows; needed where it is public, else it may be left open."""
    time_limit_s: Seconds | None = None
    """Seconds after which the upload is given up; by default ten minutes and one second per megabyte."""

    def __post_init__(self) -> None:
        check_numbers(self, "")
        if self.public and self.license is None:
            raise ValueError("public needs license, an identifier that the Hub knows: mit, apache-2.0, other ...")
