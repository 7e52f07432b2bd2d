"""A step's samples are the same for every number of processes and micro-batches, and for every way to get there."""

import numpy as np
import pytest
import torch

from gpt2x.batches.loader import TrainingBatches
from gpt2x.batches.order import GlobalOrder
from gpt2x.batches.source import ShardSource
from gpt2x.errors import UserError

PER_STEP, LENGTH = 24, 5


@pytest.fixture
def sources(make_index):
    """Two sources of 50 and 31 windows."""
    index = make_index([[100, 33], [120]], [[159]])
    return [ShardSource(index, split, LENGTH) for split in ("train", "validation")]


@pytest.fixture
def order(sources):
    return GlobalOrder.of(sources, seed=3, weights=[2, 1])


def batches(order, sources, micro_batch_size=PER_STEP, rank=0, num_processes=1):
    return TrainingBatches(
        order,
        sources,
        sequences_per_step=PER_STEP,
        micro_batch_size=micro_batch_size,
        rank=rank,
        num_processes=num_processes,
    )


def naive_step(order, sources, step):
    """The sequences of a step, looked up one by one."""
    found = []
    for position in range(step * PER_STEP, (step + 1) * PER_STEP):
        (source,), window = order.sample_positions(position, position + 1)
        found.append(sources[source].windows(window)[0].tolist())
    return found


def rows(parts):
    return [row for part in parts for row in part["input_ids"].tolist()]


CUTS = [(w, b) for w in (1, 2, 3, 4, 6, 8, 24) for b in (1, 2, 3, 4, 12, 24) if PER_STEP % (w * b) == 0]


@pytest.mark.parametrize(("num_processes", "micro_batch_size"), CUTS)
def test_a_step_is_the_same_for_every_number_of_processes_and_micro_batches(
    order, sources, num_processes, micro_batch_size
):
    ranks = [batches(order, sources, micro_batch_size, rank, num_processes) for rank in range(num_processes)]
    for step in (0, 1, 5, 1000):
        parts = [rank.step(step) for rank in ranks]
        assert {len(part) for part in parts} == {PER_STEP // num_processes // micro_batch_size}
        assert [row for part in parts for row in rows(part)] == naive_step(order, sources, step)


def test_steps_can_be_asked_for_in_any_order_and_again(order, sources):
    loader = batches(order, sources)
    forward = [rows(loader.step(step)) for step in range(6)]
    assert [rows(loader.step(step)) for step in (5, 3, 3, 0, 4, 1, 2)] == [forward[s] for s in (5, 3, 3, 0, 4, 1, 2)]


def test_every_window_is_trained_on_once_per_epoch(make_index):
    source = ShardSource(make_index([[LENGTH * PER_STEP * 3]]), "train", LENGTH)
    loader = batches(GlobalOrder.of([source], seed=0), [source])
    everything = sorted(source.windows(np.arange(source.num_windows)).tolist())
    epochs = [[row for step in range(3 * epoch, 3 * epoch + 3) for row in rows(loader.step(step))] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]


def test_a_micro_batch_is_int64_on_the_cpu_with_labels_that_are_not_shifted(order, sources):
    for part in batches(order, sources, micro_batch_size=8).step(2):
        assert part["input_ids"].shape == (8, LENGTH)
        assert part["input_ids"].dtype == torch.int64
        assert part["input_ids"].device.type == "cpu"
        assert torch.equal(part["labels"], part["input_ids"])


def test_a_step_that_cannot_be_cut_evenly_is_refused(order, sources):
    with pytest.raises(UserError, match=r"24 sequences per step must be a multiple of .* = 5 x 1 = 5; change"):
        batches(order, sources, micro_batch_size=5)


def test_too_little_data_for_a_step_is_refused_with_the_largest_step_that_works(make_index):
    source = ShardSource(make_index([[LENGTH * 23]]), "train", LENGTH)
    order = GlobalOrder.of([source], seed=0)
    with pytest.raises(
        UserError, match=r"has 23 sequences of 5 tokens, fewer than the 24 of one step; set .*step to 20 x 5 = 100 "
    ):
        batches(order, [source], micro_batch_size=4)


def test_too_little_data_for_a_micro_batch_is_refused_with_the_largest_that_works(make_index):
    source = ShardSource(make_index([[LENGTH * 7]]), "train", LENGTH)
    order = GlobalOrder.of([source], seed=0)
    with pytest.raises(UserError, match=r"has 7 sequences .*; set micro_batch_size x processes \(12\) to 7 or less"):
        batches(order, [source], micro_batch_size=6, rank=1, num_processes=2)
