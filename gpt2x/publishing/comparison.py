"""Whether an export computes what its model computes.

Shapes: B sequences, T tokens, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel

from gpt2x.errors import UserError

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
