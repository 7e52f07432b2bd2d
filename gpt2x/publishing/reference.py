"""What the files of a model say, as transformers alone reads them: the measure of every export.

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
from transformers import PreTrainedModel

import modeling_gpt2x
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, read_json
from gpt2x.models import load_whole
from gpt2x.publishing.comparison import model_logits, positions, sample_batch
from modeling_gpt2x.modeling_gpt2x import AUTO_MAP


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
