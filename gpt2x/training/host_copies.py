"""Copies of weights and optimizer state, from which a checkpoint is written while the originals are trained on."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

NamedTensors = Iterable[tuple[str, Tensor]]
Place = tuple[int, torch.Size]


class HostCopies:
    """Buffers in host memory that are kept from one save to the next.

    They take as much memory as what is copied, once: fresh memory costs ten times what copying into used one does.
    Those for tensors of a GPU are page-locked, so that the GPU fills them by itself.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, tensors: NamedTensors) -> None:
        """Makes the buffers and touches every page of them; reads nothing but shapes, so any thread may do it."""
        distinct = {_place(tensor): (name, tensor) for name, tensor in reversed(list(tensors))}
        for name, tensor in distinct.values():
            self._buffer(name, tensor).zero_()

    def take(self, tensors: NamedTensors) -> dict[str, Tensor]:
        """Copies the tensors as they are now, and returns when that is done.

        Args:
            tensors: named; those that share memory, as tied weights do, are copied once and share it again.

        Returns:
            The copies, valid until the next take.
        """
        copies: dict[str, Tensor] = {}
        first_of: dict[Place, tuple[weakref.ref[Tensor], Tensor]] = {}
        for name, tensor in tensors:
            alive, copy = first_of.get(_place(tensor), (None, None))
            if copy is None or alive is None or alive() is None:  # memory that was freed may be another tensor's now
                copy = self._buffer(name, tensor).copy_(tensor.detach(), non_blocking=True)
                first_of[_place(tensor)] = weakref.ref(tensor), copy
            copies[name] = copy
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer


def _place(tensor: Tensor) -> Place:
    return tensor.data_ptr(), tensor.shape
