"""Saving while training goes on: one thread copies and writes, the training waits for the copy before its next update.

Weights and optimizer state change in the update alone, so the copy has the time of a whole forward and backward pass.
Older checkpoints are deleted once the newest has proved sound: by a finite loss of the step after it, or a validation.
"""

import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gpt2x.checkpoints.format import TrainerState, write_checkpoint
from gpt2x.checkpoints.retention import prune
from gpt2x.checkpoints.state import NamedTensors, State, first_not_finite, not_saved
from gpt2x.config import TrainSection
from gpt2x.errors import UserError
from gpt2x.files import UnwritableError
from gpt2x.runs.layout import checkpoint_dir

WriteModel = Callable[[Path, Mapping[str, Tensor]], object]
# Where a tensor begins, and its shape: of tensors that are alive, those of one place are one.
Place = tuple[int, torch.Size]

# What each copy begins at a multiple of: a line of a processor's cache.
_ALIGNMENT = 64
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every GPU


class Run(Protocol):
    """The run whose checkpoints are saved; see gpt2x.runs.directory."""

    @property
    def path(self) -> Path:
        """``runs/NAME``."""

    def check(self) -> None:
        """Raises UserError where the directory is no longer this run's."""

    def sync_records(self) -> None:
        """Makes durable what was recorded up to here."""


class CheckpointSaver:
    """Saves the checkpoints of a run, one after the other, in a thread of its own.

    Attributes:
        last_step: the step that was saved last, or that the run went on from.
        is_reserved: whether reserve was called.
    """

    def __init__(
        self, run: Run, write_model: WriteModel, *, rules: TrainSection, last_step: int | None = None
    ) -> None:
        """Starts no thread yet.

        Args:
            run: where the checkpoints go.
            write_model: writes model and tokenizer into a directory, from the weights it is given.
            rules: by which checkpoints are kept; see gpt2x.checkpoints.retention.
            last_step: the step of the checkpoint that the run goes on from.
        """
        self.run, self.rules, self.last_step = run, rules, last_step
        self._write_model, self._copies = write_model, HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._unconfirmed: TrainerState | None = None
        self._is_copied = Event()
        self._is_copied.set()
        self.is_reserved = False

    def reserve(self, state: State) -> None:
        """Gets the memory for the copies in the background, so that the first save is as quick as the others."""
        self.is_reserved = True
        self.wait()
        self._pending = self._thread.submit(self._copies.reserve, list(state.tensors()))

    def save(self, state: State, *, is_last: bool = False) -> None:
        """Has the state copied and written, unless it is; waits for the save before, whose memory it uses.

        Until wait_for_copy has returned nothing may change the tensors.

        Args:
            state: what to save.
            is_last: whether nothing is trained from here on, so that nothing needs to be copied.

        Raises:
            UserError: what the save before raised.
        """
        if self.last_step == state.trainer["step"]:
            self._unconfirmed = state.trainer  # a kill may have prevented that older ones were deleted
            return
        self.wait()
        self.last_step, self._unconfirmed = state.trainer["step"], state.trainer
        self._is_copied.clear()
        tensors, trainer_json = dict(state.tensors()), json.dumps(state.trainer, allow_nan=False)
        self._pending = self._thread.submit(self._copy_and_write, tensors, trainer_json, needs_copy=not is_last)

    def confirm(self, step: int, *, best_step: int | None) -> None:
        """Tells that a loss of the weights of this step is finite: older checkpoints may give way to one of it.

        Args:
            step: whose loss is known.
            best_step: of the lowest validation loss so far; that of a last step is known after it is saved.
        """
        if self._unconfirmed is not None and self._unconfirmed["step"] <= step and not self.is_busy:
            if not self.has_failed:
                self._pending = self._thread.submit(self._prune, self._unconfirmed | {"best_step": best_step})
            self._unconfirmed = None

    def wait_for_copy(self) -> None:
        """Waits until what is being saved may change."""
        self._is_copied.wait()

    @property
    def is_busy(self) -> bool:
        """Whether a save is being made."""
        return self._pending is not None and not self._pending.done()

    @property
    def has_failed(self) -> bool:
        """Whether a save has failed; wait raises what it raised."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            UserError: where it could not be.
        """
        if self._pending is not None:
            self._pending.result()

    def _copy_and_write(self, tensors: Mapping[str, Tensor], trainer_json: str, *, needs_copy: bool) -> None:
        try:
            copies = self._copies.take(tensors.items()) if needs_copy else tensors
        finally:
            self._is_copied.set()
        self._write(copies, json.loads(trainer_json))

    def _write(self, copies: Mapping[str, Tensor], trainer: TrainerState) -> None:
        target = checkpoint_dir(self.run.path, trainer["step"])
        weights, optimizer = _untagged("model", copies), _untagged("optimizer", copies)
        self.run.check()
        if (name := first_not_finite(copies.items())) is not None:
            reason = f"step {trainer['step']}: {name.partition(':')[2]} is not finite"
            raise UserError(not_saved(self.run.path, trainer["step"], reason))
        try:
            self.run.sync_records()  # no checkpoint is durable before the records of its steps
            write_checkpoint(
                target,
                write_model=lambda directory: self._write_model(directory, weights),
                optimizer=optimizer,
                trainer=trainer,
            )
        except (OSError, UnwritableError) as error:
            self.run.check()  # which says more where the directory has gone in the meantime
            raise UserError(_failure(target, error, copies)) from error

    def _prune(self, trainer: TrainerState) -> None:
        self.run.check()
        prune(self.run.path, trainer, self.rules)


def _untagged(tag: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{tag}:"): tensor for name, tensor in tensors.items() if name.startswith(f"{tag}:")}


def _failure(target: Path, error: OSError | UnwritableError, copies: Mapping[str, Tensor]) -> str:
    """One line: what could not be written, how much it needs, how much there is."""
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in copies.values()}
    reason = error.reason if isinstance(error, UnwritableError) else error.strerror or str(error)
    free = _free_bytes(target.parent)
    return (
        f"{target} could not be saved ({reason}): it needs {sum(sizes.values()):,} bytes, {free:,} are free; older "
        f"checkpoints are kept. Make room, and the same command goes on from the newest."
    )


def _free_bytes(directory: Path) -> int:
    try:
        return shutil.disk_usage(directory).free
    except OSError:  # the directory has vanished
        return 0


# --- the copies -----------------------------------------------------------------------------------------------------


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
