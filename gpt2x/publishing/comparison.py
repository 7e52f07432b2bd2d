"""Whether an export computes what the files of its model say, as transformers alone reads them.

A stock form is read by transformers' own class, to which its model type leads whatever of ours is imported here. To
gpt2x's form our own class is registered in this process, so it is read in another one that has transformers only, by
the code beside the weights. That code is executed, so it must be byte for byte what gpt2x ships; else our class reads.

Shapes: B sequences, T tokens, V vocabulary.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel

import modeling_gpt2x
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, read_json
from gpt2x.models import load_whole
from modeling_gpt2x.modeling_gpt2x import AUTO_MAP

# How far the logits may be off, ||export - model|| / ||model||. Rounding stays far below; what is wired wrongly,
# a position or a head, is near 1.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02, "q8_0": 0.1, "int8": 0.3}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far an export is from its model."""

    largest: float
    """Largest absolute difference of a logit."""
    relative: float
    """Norm of the difference over the norm of the model's logits."""
    same_choices: float
    """Share of the positions at which both find the same token likeliest."""

    def __str__(self) -> str:
        return f"largest logit difference {self.largest:.2g}, same likeliest token at {self.same_choices:.1%}"


def sample_batch(config: PreTrainedConfig, *, num_tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (2, T) that are the same in every call, and their attention mask, whose first row is left-padded."""
    length = min(num_tokens, config.max_position_embeddings)
    ids_BT = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, (2, length)))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, : length // 3] = 0
    return ids_BT, mask_BT


def positions(mask_BT: torch.Tensor) -> torch.Tensor:
    """Position ids (B, T) that count the attended tokens only."""
    return (mask_BT.cumsum(-1) - 1).clamp(min=0)


def model_logits(model: PreTrainedModel, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> NDArray[np.float32]:
    """The model's logits (B, T, V), without a cache."""
    with torch.no_grad():
        output = model(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            position_ids=positions(mask_BT).to(model.device),
            use_cache=False,
        )
    return output.logits.float().cpu().numpy()


def compare(
    logits_BTV: NDArray[np.float32], expected_BTV: NDArray[np.float32], mask_BT: torch.Tensor, *, dtype: str
) -> Difference:
    """Measures an export's logits against its model's at the attended positions.

    Raises:
        UserError: where they differ by more than the rounding of `dtype` explains.
    """
    attended_BT = mask_BT.numpy().astype(bool)
    logits_NV, expected_NV = logits_BTV[attended_BT], expected_BTV[attended_BT]
    difference = Difference(
        largest=float(np.abs(logits_NV - expected_NV).max()),
        relative=float(np.linalg.norm(logits_NV - expected_NV) / np.linalg.norm(expected_NV)),
        same_choices=float((logits_NV.argmax(-1) == expected_NV.argmax(-1)).mean()),
    )
    if not difference.relative <= TOLERANCES[dtype]:  # also where it is NaN
        remedy = "Export as float32." if dtype != "float32" else "Report this: it is a fault of gpt2x."
        raise UserError(
            f"the {dtype} export differs from the model by {difference.relative:.2g} of its logits, more than the "
            f"{TOLERANCES[dtype]:g} that rounding explains; nothing was written. {remedy}"
        )
    return difference


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Some tokens, and what a model makes of them."""

    ids: torch.Tensor
    """The tokens (B, T)."""
    mask: torch.Tensor
    """Their attention mask (B, T)."""
    logits: NDArray[np.float32]
    """The model's logits (B, T, V)."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Reference":
        """What a model in memory says."""
        ids_BT, mask_BT = sample_batch(model.config)
        return cls(ids=ids_BT, mask=mask_BT, logits=model_logits(model, ids_BT, mask_BT))

    @classmethod
    def read(cls, name_or_path: str) -> "Reference":
        """What a model's files say, in float32.

        Raises:
            UserError: where they are damaged, lack a tensor, or hold one of another shape.
        """
        if not _is_our_form_with_our_code(Path(name_or_path)):
            return cls.of(load_whole(name_or_path, dtype=torch.float32).eval())
        config = load_whole(name_or_path, device_map="meta").config
        ids_BT, mask_BT = sample_batch(config)
        return cls(ids=ids_BT, mask=mask_BT, logits=_logits_by_its_own_code(name_or_path, ids_BT, mask_BT))


def _is_our_form_with_our_code(directory: Path) -> bool:
    shipped = {file.name: file.read_bytes() for file in Path(modeling_gpt2x.__file__).parent.glob("*_gpt2x.py")}
    try:
        config = read_json(directory / "config.json", dict[str, Any])
        found = {file.name: file.read_bytes() for file in directory.rglob("*.py")}
    except (DamagedError, OSError):
        return False
    return (config.get("model_type"), config.get("auto_map")) == ("gpt2x", AUTO_MAP) and found == shipped


def _logits_by_its_own_code(directory: str, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> NDArray[np.float32]:
    """Logits (B, T, V), in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        np.savez(
            Path(scratch) / "tokens.npz",
            input_ids=ids_BT.numpy(),
            attention_mask=mask_BT.numpy(),
            position_ids=positions(mask_BT).numpy(),
        )
        # -I: neither the working directory nor PYTHONPATH is looked through for modules.
        process = Path(__file__).with_name("reference_process.py")
        command = [sys.executable, "-I", str(process), str(Path(directory).resolve()), scratch]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode != 0:
            lines = finished.stderr.strip().splitlines() or [f"its process ended with {finished.returncode}"]
            raise UserError(f"the model in {directory} cannot be loaded by the code beside it: {lines[-1]}")
        return np.load(Path(scratch) / "logits.npy")
