"""Weights and optimizer state that lie in shards on several devices (FSDP2, HSDP, tensor parallel), whole and back.

A checkpoint holds everything whole and knows nothing of shards, so it goes on with any number of devices. Tensors
that are not sharded go through the same functions, as they are and at no cost.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether parts of the weights lie on other devices, so that reading them needs every process."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_weights(model: nn.Module, *, is_writer: bool) -> dict[str, Tensor]:
    """The state dict of a model, whole; see gather.

    Args:
        model: as accelerate unwraps it; every process must ask where it is sharded.
        is_writer: whether this process wants them.
    """
    # the parameters themselves, by which tied weights are known: views of a shard are different objects
    return gather(model.state_dict(keep_vars=True), is_writer=is_writer)


# Not by torch's get_model_state_dict and get_optimizer_state_dict (full_state_dict, cpu_offload): they gather a tied
# weight once for each of its names, hand on step counts that are no copies, and let an optimizer without state step.
def gather(tensors: Mapping[str, Tensor], *, is_writer: bool) -> dict[str, Tensor]:
    """Puts shards together, one tensor after the other, so that no device ever holds more than one of them whole.

    Args:
        tensors: by name, the same names in the same order on every process.
        is_writer: whether this process wants them.

    Returns:
        Where none is sharded, all as they are. Else on the writer whole copies in host memory, one for names that
        share one tensor; on other processes nothing.
    """
    has_shards = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    found: dict[int, Tensor | None] = {}
    for tensor in tensors.values():
        if id(tensor) not in found:
            found[id(tensor)] = _whole_on_host(tensor, is_writer=is_writer) if has_shards else tensor.detach()
    pairs = ((name, found[id(tensor)]) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in pairs if tensor is not None}


def _whole_on_host(tensor: Tensor, *, is_writer: bool) -> Tensor | None:
    with torch.no_grad():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True) if is_writer else None


def whole_matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the same shape, each whole on every process."""
    return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def in_shards_like(originals: Iterable[Tensor], wholes: Iterable[Tensor]) -> list[Tensor]:
    """Of each whole tensor this process's shard, cut as its original is; without communication.

    Args:
        originals: sharded or not.
        wholes: the same on every process, of the originals' shapes.
    """
    return [_in_shards_like(original, whole) for original, whole in zip(originals, wholes, strict=True)]


def _in_shards_like(original: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(original, DTensor):
        return whole
    whole = whole.to(original.to_local().device)
    return distribute_tensor(whole, original.device_mesh, original.placements, src_data_rank=None)


def state_in_shards(parameter: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An optimizer's saved state of a parameter: what has its shape is sharded as the parameter is."""
    with torch.no_grad():
        return {
            name: _in_shards_like(parameter, tensor) if tensor.shape == parameter.shape else tensor
            for name, tensor in state.items()
        }
