"""Reading ahead changes nothing but speed."""

import threading
import time

import numpy as np
import pytest
import torch

from gpt2x.batches.loader import StepBatch, TrainingBatches
from gpt2x.batches.order import GlobalOrder, Phase
from gpt2x.batches.read_ahead import ReadAhead
from gpt2x.batches.source import ShardSource
from gpt2x.errors import UserError

NUM_STEPS, PER_STEP, LENGTH = 40, 24, 5


@pytest.fixture
def sources(make_index):
    index = make_index([[100, 33], [120]], [[159]])
    return [ShardSource(index, LENGTH, name=split, split=split) for split in ("train", "validation")]


def loader(sources, *, num_processes=1, rank=0, accumulation=1):
    order = GlobalOrder(3, [Phase(sequences_per_step=PER_STEP, weights={"train": 2, "validation": 1}, block_size=30)])
    micro_batch_size = PER_STEP // num_processes // accumulation
    return TrainingBatches(order, sources, micro_batch_size=micro_batch_size, rank=rank, num_processes=num_processes)


def sequences(batch):
    return [tuple(row) for part in batch.micro_batches for row in part["input_ids"].tolist()]


def samples_of_steps(sources, *, num_processes, num_workers, accumulation, steps=range(NUM_STEPS)):
    """Per step the sequences of all processes, and the sum of their checksums."""
    ranks = [
        ReadAhead(
            loader(sources, num_processes=num_processes, rank=rank, accumulation=accumulation),
            num_workers=num_workers,
            prefetch_steps=3,
        )
        for rank in range(num_processes)
    ]
    found = []
    for step in steps:
        batches = [rank.step(step, last=NUM_STEPS) for rank in ranks]
        assert {len(batch.micro_batches) for batch in batches} == {accumulation}
        found.append(([row for batch in batches for row in sequences(batch)], sum(b.checksum for b in batches)))
    for rank in ranks:
        rank.close()
    return found


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize(
    ("num_processes", "accumulation"), [(1, 1), (1, 2), (1, 8), (2, 1), (2, 2), (3, 1), (3, 2), (3, 8), (4, 1), (4, 2)]
)
def test_forty_steps_are_the_same_on_any_processes_workers_and_accumulation(
    sources, num_processes, num_workers, accumulation
):
    plain = loader(sources)
    expected = [(sequences(batch), batch.checksum) for batch in map(plain.step, range(NUM_STEPS))]
    found = samples_of_steps(sources, num_processes=num_processes, num_workers=num_workers, accumulation=accumulation)
    assert found == expected


def test_a_run_that_goes_on_twice_on_other_processes_repeats_and_skips_nothing(sources):
    plain = loader(sources)
    expected = [(sequences(batch), batch.checksum) for batch in map(plain.step, range(NUM_STEPS))]
    found = []
    for num_processes, steps in ((1, range(0, 13)), (4, range(13, 27)), (2, range(27, NUM_STEPS))):
        found += samples_of_steps(sources, num_processes=num_processes, num_workers=1, accumulation=2, steps=steps)
    assert found == expected


class SlowBatches:
    """Counts what is read, and by whom."""

    def __init__(self, *, broken_at=None):
        self.read, self.threads, self.broken_at = [], set(), broken_at
        self.sources = {}

    def step(self, step):
        self.read.append(step)
        self.threads.add(threading.current_thread())
        if step == self.broken_at:
            raise UserError(f"step {step} is broken")
        time.sleep(0.02)
        return StepBatch([{"input_ids": torch.tensor([[step]])}], step)

    def close(self):
        self.closed = True


def test_steps_are_read_while_the_present_one_is_trained_on():
    batches = SlowBatches()
    ahead = ReadAhead(batches, num_workers=1, prefetch_steps=2)
    ahead.step(0)
    assert ahead.waited_s >= 0.02
    deadline = time.monotonic() + 10
    while len(batches.read) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert batches.read == [0, 1, 2]
    assert threading.main_thread() not in batches.threads
    ahead.close()
    assert batches.closed


def test_nothing_is_read_beyond_the_last_step_and_nothing_twice():
    batches = SlowBatches()
    ahead = ReadAhead(batches, num_workers=2, prefetch_steps=4)
    for step in range(6):
        ahead.step(step, last=6)
    assert sorted(batches.read) == list(range(6))


def test_another_step_than_the_next_is_read_all_the_same():
    ahead = ReadAhead(SlowBatches(), num_workers=1, prefetch_steps=2)
    assert [ahead.step(step).checksum for step in (0, 1, 100, 101, 5, 5)] == [0, 1, 100, 101, 5, 5]


def test_without_workers_a_step_is_read_when_it_is_asked_for():
    batches = SlowBatches()
    ahead = ReadAhead(batches, num_workers=0)
    ahead.step(3)
    assert batches.read == [3]
    assert batches.threads == {threading.main_thread()}


def test_what_is_wrong_with_a_step_is_told_at_that_step():
    ahead = ReadAhead(SlowBatches(broken_at=2), num_workers=1, prefetch_steps=2)
    assert [ahead.step(step).checksum for step in (0, 1)] == [0, 1]
    with pytest.raises(UserError, match="step 2 is broken"):
        ahead.step(2)
    ahead.close()


def test_a_step_far_on_is_there_as_soon_as_a_near_one(sources):
    """Nothing is skipped through: the first batch of step 1,000,000 takes no longer than two seconds."""
    for step in (10, 1_000_000):
        started = time.perf_counter()
        loader(sources).step(step)
        assert time.perf_counter() - started < 2
    assert np.unique([loader(sources).step(step).checksum for step in (10, 1_000_000)]).size == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_source_that_may_be_waited_for_is_waited_for_in_parts(sources, monkeypatch, num_workers):
    """A stream's rows come when they come; what asks for them is free in between."""
    ahead, there = ReadAhead(loader(sources), num_workers=num_workers), threading.Event()
    expected, read = ahead.batches.step(0), TrainingBatches.step
    monkeypatch.setattr(TrainingBatches, "step", lambda self, step: there.wait(10) and read(self, step))
    monkeypatch.setattr(ReadAhead, "can_fail", True)
    assert [ahead.step(0, last=1, patience_s=0.05), ahead.step(0, last=1, patience_s=0.05)] == [None, None]
    there.set()
    assert sequences(ahead.step(0, last=1, patience_s=5)) == sequences(expected)
    assert 0.1 <= ahead.waited_s < 5
    ahead.close()
