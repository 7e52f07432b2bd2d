"""Copies of weights and optimizer state, from which a checkpoint is written while the originals are trained on."""

import weakref
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

NamedTensors = Iterable[tuple[str, Tensor]]
# Where a tensor begins, and its shape: of tensors that are alive, those of one place are one.
Place = tuple[int, torch.Size]

# What each copy begins at a multiple of: a line of a processor's cache.
_ALIGNMENT = 64
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every GPU


class HostCopies:
    """Buffers in host memory that are kept from one save to the next.

    They take as much memory as what is copied, once: fresh memory costs ten times what copying into used one does.
    Those for tensors of a GPU are page-locked, so that the GPU fills them by itself. They are cut from one block:
    torch's own page-locked memory comes in powers of two, which for GPT-2 and AdamW is 1.8 times as much.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[torch.dtype, torch.Size, bool]] = []
        self._buffers: list[Tensor] = []

    def reserve(self, tensors: NamedTensors) -> None:
        """Makes the buffers and touches every page of them; reads nothing but shapes, so any thread may do it."""
        for buffer in self._buffers_for(_distinct(list(tensors))).values():
            buffer.zero_()

    def take(self, tensors: NamedTensors) -> dict[str, Tensor]:
        """Copies the tensors as they are now, and returns when that is done.

        Args:
            tensors: named; those that share memory, as tied weights do, are copied once and share it again.

        Returns:
            The copies, valid until the next take.
        """
        named = list(tensors)  # all alive until the end, so that no memory becomes another tensor's on the way
        distinct = _distinct(named)
        buffers = self._buffers_for(distinct)
        for place, tensor in distinct.items():
            buffers[place].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        for device in {tensor.device for tensor in distinct.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).record_event().synchronize()
        return {name: buffers[_place(tensor)] for name, tensor in named}

    def _buffers_for(self, distinct: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
        layout = [(tensor.dtype, tensor.shape, tensor.is_cuda) for tensor in distinct.values()]
        if layout != self._layout:
            self._layout, self._buffers = [], []  # freed before others are made
            self._buffers = _cut(list(distinct.values()))
            self._layout = layout
        return dict(zip(distinct, self._buffers, strict=True))


def _place(tensor: Tensor) -> Place:
    return tensor.data_ptr(), tensor.shape


def _distinct(named: list[tuple[str, Tensor]]) -> dict[Place, Tensor]:
    return {_place(tensor): tensor for _, tensor in named}


def _cut(tensors: list[Tensor]) -> list[Tensor]:
    """A buffer for each tensor, one behind the other in one block, and to everybody else tensors of their own."""
    starts = np.cumsum([0, *(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)]).tolist()
    memory = _memory(starts[-1], is_page_locked=any(tensor.is_cuda for tensor in tensors))
    return [
        torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
        if tensor.numel()
        else torch.empty(tensor.shape, dtype=tensor.dtype)
        for tensor, start in zip(tensors, starts, strict=False)
    ]


def _memory(num_bytes: int, *, is_page_locked: bool) -> np.ndarray:
    memory = np.empty(num_bytes, np.uint8)
    if is_page_locked:
        cudart, address = torch.cuda.cudart(), memory.ctypes.data
        if failure := int(cudart.cudaHostRegister(address, num_bytes, _PORTABLE)):
            raise torch.cuda.CudaError(failure)
        weakref.finalize(memory, cudart.cudaHostUnregister, address)
    return memory
