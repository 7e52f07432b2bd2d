"""Which device computes, and what other devices than the CPU are spared: fake tensors stand for those that are not
here."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2x.distributed.devices import compute_device, forked_rng, on_device, without_cudnn_attention

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("environment", "found", "expected"),
    [
        ({}, CUDA, "cuda"),
        ({"ACCELERATE_USE_CPU": "False"}, CUDA, "cuda"),
        ({"ACCELERATE_USE_CPU": "True"}, CUDA, "cpu"),
        ({"ACCELERATE_USE_CPU": "true"}, CUDA, "cpu"),
        ({}, torch.device("mps"), "mps"),
        ({}, None, "cpu"),
    ],
)
def test_the_accelerator_computes_unless_there_is_none_or_the_launcher_says_cpu(
    monkeypatch, environment, found, expected
):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert compute_device(environment).type == expected


class Copies(TorchDispatchMode):
    """Takes down every copy from one device to another: (where to, whether it is waited for)."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            self.found.append((str(kwargs["device"]), not kwargs.get("non_blocking", False)))
        return func(*args, **kwargs)


@pytest.mark.parametrize(("device", "waits"), [("cuda:0", False), ("mps:0", True), ("xpu:0", True)])
def test_a_batch_is_copied_once_where_ids_are_labels_and_only_cuda_copies_meanwhile(device, waits):
    with FakeTensorMode():
        ids, positions = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
        with Copies() as copies:
            there = on_device({"input_ids": ids, "labels": ids, "position_ids": positions}, torch.device(device))
    assert list(there) == ["input_ids", "labels", "position_ids"]
    assert there["labels"] is there["input_ids"]
    assert {str(tensor.device) for tensor in there.values()} == {device}
    assert copies.found == [(device, waits)] * 2


@pytest.mark.parametrize("before", [True, False])
def test_attention_is_by_cudnn_again_afterwards_where_it_was_before(before):
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with without_cudnn_attention():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("cuda:1", ["cuda:1"])])
def test_only_the_one_device_is_asked_for_its_random_state(monkeypatch, device, expected):
    asked, given_back = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda place: asked.append(str(place)))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda _state, place: given_back.append(str(place)))
    torch.manual_seed(8)
    expected_numbers = torch.rand(3)
    torch.manual_seed(8)
    with forked_rng(torch.device(device)):
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected_numbers)
    assert asked == given_back == expected
