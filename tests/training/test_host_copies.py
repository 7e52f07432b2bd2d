"""Copies for a checkpoint on every kind of device: when they are done, and what they take."""

from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2x.checkpoints import saver
from gpt2x.checkpoints.saver import HostCopies
from gpt2x.training.disk import measure_room
from gpt2x.training.steps import optimizer_step


class CopiesWaited(TorchDispatchMode):
    """Takes down of every copy into another tensor whether it is waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.found.append(not (args[2:] or [False])[0] and not (kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def test_a_device_that_is_none_of_cuda_is_waited_for_with_every_copy():
    """Nothing tells when an Apple GPU has filled memory that is not waited for."""
    with CopiesWaited() as copies:
        HostCopies().take([("a", torch.ones(3)), ("b", torch.ones(4))])
    assert copies.found == [True, True]


def test_copies_take_what_is_copied_and_hardly_more():
    tensors = {str(size): torch.arange(size, dtype=torch.float32) for size in (1, 0, 1025, 70_001, 3)}
    tensors |= {"step": torch.tensor(7.0), "short": torch.arange(9, dtype=torch.bfloat16)}
    copies = HostCopies().take(tensors.items())
    assert all(torch.equal(copies[name], tensor) for name, tensor in tensors.items())
    starts = [copy.data_ptr() for copy in copies.values() if copy.numel()]
    ends = [copy.data_ptr() + copy.nbytes for copy in copies.values() if copy.numel()]
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert num_bytes <= max(ends) - min(starts) <= num_bytes + 64 * len(tensors)
    # what writes them sees tensors of their own, not parts of one
    assert all(copy.untyped_storage().nbytes() == copy.nbytes for copy in copies.values())


def test_copies_of_a_gpus_tensors_are_page_locked_as_one_block_and_let_go_of_again(monkeypatch):
    """Against a stand-in for CUDA's runtime."""
    calls = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *arguments: calls.append(("register", *arguments)) or 0,
        cudaHostUnregister=lambda *arguments: calls.append(("unregister", *arguments)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = saver._memory(100, is_page_locked=True)
    address = memory.ctypes.data
    part = torch.frombuffer(memory, dtype=torch.float32, count=3, offset=64)
    del memory
    assert calls == [("register", address, 100, 1)]
    del part
    assert calls[1:] == [("unregister", address)]


def test_the_copies_of_a_run_take_the_memory_that_is_announced(recipe, start):
    job, _ = start(recipe)
    optimizer_step(job, job.batches.step(0).micro_batches)
    tensors = dict(job.whole_state().tensors())
    copies = {copy.data_ptr(): copy for copy in HostCopies().take(tensors.items()).values()}
    ends = [address + copy.nbytes for address, copy in copies.items()]
    announced = measure_room(job).checkpoint_bytes
    # beyond it: the number of steps that AdamW counts for each parameter, and what a copy begins at a multiple of
    assert announced <= max(ends) - min(copies) <= announced + (4 + 64) * len(tensors)
