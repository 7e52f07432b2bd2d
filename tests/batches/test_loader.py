"""A step's samples are the same for every number of processes and micro-batches, and for every way to get there."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gpt2x.batches.loader import TrainingBatches, check_unchanged
from gpt2x.batches.order import GlobalOrder, Phase
from gpt2x.batches.source import ShardSource
from gpt2x.errors import UserError

PER_STEP, LENGTH = 24, 5


@pytest.fixture
def sources(make_index):
    """Two sources of 50 and 31 windows."""
    index = make_index([[100, 33], [120]], [[159]])
    return [ShardSource(index, LENGTH, seed=3, name=split, split=split) for split in ("train", "validation")]


@pytest.fixture
def order(sources):
    return order_of(sources, weights=[2, 1], block_size=30)


def order_of(sources, weights=(1,), seed=3, **fields):
    weights = dict(zip((source.name for source in sources), weights, strict=True))
    return GlobalOrder(seed, [Phase(sequences_per_step=PER_STEP, weights=weights, **fields)])


def batches(order, sources, micro_batch_size=PER_STEP, rank=0, num_processes=1, **options):
    return TrainingBatches(
        order, sources, micro_batch_size=micro_batch_size, rank=rank, num_processes=num_processes, **options
    )


def naive_step(order, sources, step):
    """The sequences of a step, looked up one by one."""
    by_name, found = {source.name: source for source in sources}, []
    for place in range(PER_STEP):
        ((name, (_, draws)),) = order.samples(step, place, place + 1).items()
        found.append(by_name[name].sequences(draws).ids[0].tolist())
    return found


def rows(batch):
    return [row for part in batch.micro_batches for row in part["input_ids"].tolist()]


CUTS = [(w, b) for w in (1, 2, 3, 4, 6, 8, 24) for b in (1, 2, 3, 4, 12, 24) if PER_STEP % (w * b) == 0]


@pytest.mark.parametrize(("num_processes", "micro_batch_size"), CUTS)
def test_a_step_is_the_same_for_every_number_of_processes_and_micro_batches(
    order, sources, num_processes, micro_batch_size
):
    ranks = [batches(order, sources, micro_batch_size, rank, num_processes) for rank in range(num_processes)]
    for step in (0, 1, 5, 1000):
        parts = [rank.step(step) for rank in ranks]
        assert {len(part.micro_batches) for part in parts} == {PER_STEP // num_processes // micro_batch_size}
        assert [row for part in parts for row in rows(part)] == naive_step(order, sources, step)


def test_steps_can_be_asked_for_in_any_order_and_again(order, sources):
    loader = batches(order, sources)
    forward = [rows(loader.step(step)) for step in range(6)]
    assert [rows(loader.step(step)) for step in (5, 3, 3, 0, 4, 1, 2)] == [forward[s] for s in (5, 3, 3, 0, 4, 1, 2)]


def test_every_window_is_trained_on_once_per_epoch(make_index):
    source = ShardSource(make_index([[LENGTH * PER_STEP * 3]]), LENGTH)
    loader = batches(order_of([source]), [source])
    everything = sorted(source.windows.sequences(np.arange(source.num_windows)).ids.tolist())
    epochs = [[row for step in range(3 * epoch, 3 * epoch + 3) for row in rows(loader.step(step))] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]


def test_a_micro_batch_is_int64_on_the_cpu_with_labels_that_are_not_shifted(order, sources):
    for part in batches(order, sources, micro_batch_size=8).step(2).micro_batches:
        assert part["input_ids"].shape == (8, LENGTH)
        assert part["input_ids"].dtype == torch.int64
        assert part["input_ids"].device.type == "cpu"
        assert torch.equal(part["labels"], part["input_ids"])


def test_a_step_that_cannot_be_cut_evenly_is_refused(order, sources):
    with pytest.raises(UserError, match=r"24 sequences per step must be a multiple of .* = 5 x 1 = 5; change"):
        batches(order, sources, micro_batch_size=5)


def test_too_little_data_for_a_step_is_refused_with_the_largest_step_that_works(make_index):
    source = ShardSource(make_index([[LENGTH * 23]]), LENGTH)
    order = order_of([source])
    with pytest.raises(
        UserError, match=r"has 23 sequences of 5 tokens, fewer than the 24 of one step; set .*step to 20 x 5 = 100 "
    ):
        batches(order, [source], micro_batch_size=4)


def test_too_little_data_for_a_micro_batch_is_refused_with_the_largest_that_works(make_index):
    source = ShardSource(make_index([[LENGTH * 7]]), LENGTH)
    order = order_of([source])
    with pytest.raises(UserError, match=r"has 7 sequences .*; set micro_batch_size x processes \(12\) to 7 or less"):
        batches(order, [source], micro_batch_size=6, rank=1, num_processes=2)


def test_the_checksum_of_a_step_is_the_same_however_it_is_cut(order, sources):
    whole = batches(order, sources)
    for step in (0, 7):
        ranks = [batches(order, sources, 2, rank, 4).step(step) for rank in range(4)]
        assert sum(rank.checksum for rank in ranks) == whole.step(step).checksum
    assert whole.step(0).checksum != whole.step(1).checksum


def test_documents_are_masked_where_they_begin(order, sources):
    """A document begins with the end of text before it; what stands at a window's start goes on from nowhere."""
    for part in batches(order, sources, mask_documents_at=7).step(0).micro_batches:
        for ids, positions in zip(part["input_ids"].tolist(), part["position_ids"].tolist(), strict=True):
            expected = [0]
            for token in ids[1:]:
                expected.append(0 if token == 7 else expected[-1] + 1)
            assert positions == expected


def test_the_accounts_of_a_mixture_say_what_was_read_and_what_was_asked_for(order, sources):
    accounts = batches(order, sources).accounts(10)
    assert accounts["data/train/tokens"] + accounts["data/validation/tokens"] == 10 * PER_STEP * LENGTH
    assert accounts["data/train/target"] == pytest.approx(2 / 3)
    assert accounts["data/train/share"] == pytest.approx(2 / 3, abs=0.01)
    assert accounts["data/train/epochs"] == accounts["data/train/tokens"] / LENGTH / 50


def test_the_accounts_of_one_source_are_its_epochs(make_index):
    source = ShardSource(make_index([[LENGTH * PER_STEP * 3]]), LENGTH)
    assert batches(order_of([source]), [source]).accounts(6) == {"data/epochs": 2.0}


def test_a_place_of_a_step_can_be_located(make_index):
    source = ShardSource(make_index([[LENGTH * PER_STEP], [LENGTH * PER_STEP]]), LENGTH)
    loader = batches(order_of([source]), [source])
    for step, place in [(0, 0), (1, 23), (5, 4)]:
        found = re.fullmatch(r"train: epoch (\d+), (.*), tokens (\d+) to (\d+)", loader.locate(step, place))
        assert int(found[1]) == step // 2
        tokens = load_file(found[2])["tokens"][int(found[3]) : int(found[4])]
        assert tokens.tolist() == rows(loader.step(step))[place]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"seed": 4},
            r"run.seed \(4\) must stay 3: with another, samples would be repeated and lost; set it",
        ),
        ({"sequence_length": 6}, r"data.sequence_length \(6\) must stay 5: "),
    ],
)
def test_what_the_order_depends_on_may_not_change(order, sources, change, complaint):
    saved = json.loads(json.dumps(batches(order, sources).state(4)))
    check_unchanged(saved, sources, seed=3, sequence_length=LENGTH)
    with pytest.raises(UserError, match=complaint):
        check_unchanged(saved, sources, **{"seed": 3, "sequence_length": LENGTH, **change})


def test_a_source_whose_content_has_changed_is_refused_by_its_name(order, sources):
    saved = json.loads(json.dumps(batches(order, sources).state(4)))
    sources[1].fingerprint = "f" * 64
    with pytest.raises(UserError, match=r"source 'validation' has changed .* \(fingerprint .*, now ffffffffffff\)"):
        check_unchanged(saved, sources, seed=3, sequence_length=LENGTH)


def test_a_source_that_comes_or_goes_is_another_mixture(order, sources):
    saved = json.loads(json.dumps(batches(order, sources).state(4)))
    sources[1].name = "another"
    check_unchanged(saved, sources, seed=3, sequence_length=LENGTH)


def test_the_shares_of_tokens_are_exact_however_long_the_documents_of_a_source_are(make_index):
    """Three sources whose documents differ in length ten times each: in every block the weights, to the token."""
    lengths, weights = {"short": 8, "middle": 80, "long": 800}, [0.5, 0.3, 0.2]
    sources = [
        ShardSource(make_index([[length] * (2400 // length)], name=name), LENGTH, seed=3, name=name)
        for name, length in lengths.items()
    ]
    order = order_of(sources, weights=weights, block_size=PER_STEP * 5)
    loader = batches(order, sources)
    windows = {source.name: source.windows.sequences(np.arange(source.num_windows)).ids.tolist() for source in sources}
    drawn = {name: [] for name in lengths}
    for block in range(20):
        counts = dict.fromkeys(lengths, 0)
        for step in range(5 * block, 5 * block + 5):
            read = rows(loader.step(step))
            for name, (places, _) in order.samples(step, 0, PER_STEP).items():
                counts[name] += places.size * LENGTH
                drawn[name] += [read[place] for place in places]
        assert counts == {"short": 300, "middle": 180, "long": 120}
    for name, sequences in drawn.items():
        epoch = sequences[: len(windows[name])]
        assert sorted(epoch) == sorted(windows[name])
