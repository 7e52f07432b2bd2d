"""The accelerator that a process computes on, and what is not the same on all of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate.utils import str_to_bool
from torch import Tensor


def compute_device(environment: Mapping[str, str]) -> torch.device:
    """The accelerator that torch finds; the CPU where it finds none, or a launcher asks for it (``use_cpu: true``).

    Args:
        environment: of this process, as the launcher left it.
    """
    if str_to_bool(environment.get("ACCELERATE_USE_CPU", "false")):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies a batch there; CUDA goes on meanwhile, where others may still read what is no longer there (Apple's)."""
    return map_distinct(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"), tensors)


def map_distinct(function: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a function makes of each; a tensor that has two names, as ids and labels are one, goes through it once."""
    distinct = {id(tensor): tensor for tensor in tensors.values()}
    made = {key: function(tensor) for key, tensor in distinct.items()}
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Attention by torch's other kernels, where the number of keys changes all the time.

    cuDNN, the first choice on Hopper, plans anew for every number, which takes longer than the rest of a token.
    Training has one length and keeps it.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Leaves the random state of the CPU and of one device as it was; other devices may be other people's."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        yield
