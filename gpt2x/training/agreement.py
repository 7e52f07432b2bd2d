"""What all ranks decide together, once per step."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from gpt2x.batches.ranks import data_rank


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What one rank knows of a step, or all of them together.

    Attributes:
        seconds: how long the step took; of rank 0.
        stops: whether the run is to stop; of any rank.
        saves: whether it is to be saved now; of any rank.
        is_spike: whether the loss is out of the ordinary; of rank 0.
        checksum: of the samples; the sum over the ranks, those that read the same counted once.
    """

    seconds: float = 0.0
    stops: bool = False
    saves: bool = False
    is_spike: bool = False
    checksum: int = 0


def agree(accelerator: Accelerator, own: Vote) -> Vote:
    """The votes of all ranks as one, the same on all of them."""
    if accelerator.num_processes == 1:
        return own
    clock, is_spike = (round(own.seconds * 1e6), own.is_spike) if accelerator.is_main_process else (0, False)
    checksum = own.checksum if data_rank(accelerator).is_first_copy else 0
    numbers = torch.tensor([clock, own.stops, own.saves, is_spike, checksum], device=accelerator.device)
    microseconds, stops, saves, spikes, checksum = accelerator.reduce(numbers, reduction="sum").tolist()
    return Vote(seconds=microseconds / 1e6, stops=stops > 0, saves=saves > 0, is_spike=spikes > 0, checksum=checksum)
