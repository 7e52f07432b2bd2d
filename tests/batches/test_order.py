"""The order is a pure function of (seed, mixture, place), exact in its weights, and each epoch a permutation."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from gpt2x.batches.order import GlobalOrder, Phase, epoch_windows, permute, phases_of_json, round_keys
from gpt2x.errors import UserError

NUM_WINDOWS = {"a": 100, "b": 37, "c": 11}


def order(weights=None, seed=0, sequences_per_step=20, **fields):
    weights = weights or {"a": 6.0, "b": 3.0, "c": 1.0}
    return GlobalOrder(seed, [Phase(sequences_per_step=sequences_per_step, weights=weights, **fields)])


def places(order, step, start=0, stop=None):
    """What stands at the places of a step, as pairs (source, draw)."""
    stop = order.phase_at(step).sequences_per_step if stop is None else stop
    found = [None] * (stop - start)
    for name, (where, draws) in order.samples(step, start, stop).items():
        for place, draw in zip(where.tolist(), draws.tolist(), strict=True):
            found[place] = (name, draw)
    assert None not in found
    return found


def steps(order, start, stop):
    return [sample for step in range(start, stop) for sample in places(order, step)]


def naive_samples(order, count):
    """The definition in the module's docstring, place by place, with nothing but the permutation shared."""
    (phase,) = order.phases
    names = [name for name, n in zip(phase.weights, phase.counts_per_block, strict=True) for _ in range(n)]
    drawn, found = Counter(), []
    for position in range(count):
        block, place = divmod(position, phase.block_size)
        keys = round_keys(order.seed, "block", 0, block)
        name = names[permute(np.array([place]), phase.block_size, keys)[0]]
        found.append((name, drawn[name]))
        drawn[name] += 1
    return found


def test_the_permutation_is_a_bijection_of_every_size():
    for size in range(1, 1001):
        permuted = permute(np.arange(size), size, round_keys("key", size))
        assert np.array_equal(np.sort(permuted), np.arange(size)), size


def test_the_permutation_of_a_large_size_repeats_nothing():
    size = 2**40 + 12345
    permuted = permute(np.arange(size - 200_000, size), size, round_keys("large"))
    assert np.unique(permuted).size == 200_000
    assert permuted.min() >= 0
    assert permuted.max() < size


def test_the_permutation_of_a_value_does_not_depend_on_the_others():
    keys = round_keys(1)
    together = permute(np.arange(777), 777, keys)
    assert [int(permute(np.array([value]), 777, keys)[0]) for value in range(777)] == together.tolist()


def test_the_permutation_is_the_same_in_every_version():
    expected = [11, 4, 3, 0, 2, 10, 9, 7, 8, 6, 5, 1]
    assert permute(np.arange(12), 12, round_keys(0, "source", "train", 0)).tolist() == expected


def test_the_permutation_looks_random():
    """Of 2000 permutations of 4, each of the 24 comes up; far-away values do not stay neighbours."""
    seen = Counter(tuple(permute(np.arange(4), 4, round_keys("small", key)).tolist()) for key in range(2000))
    assert len(seen) == 24
    assert max(seen.values()) < 160
    large = permute(np.arange(100_000), 100_000, round_keys("large"))
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 0.01
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.01


def test_the_order_is_that_of_its_definition():
    mixture = order(block_size=30)
    assert steps(mixture, 0, 20) == naive_samples(mixture, 400)


def test_any_piece_of_a_step_is_that_piece():
    mixture = order(block_size=30)
    for step in (0, 3, 1000):
        whole = places(mixture, step)
        for start, stop in [(0, 1), (9, 11), (3, 19), (19, 20), (7, 7)]:
            assert places(mixture, step, start, stop) == whole[start:stop]


def test_every_block_has_exactly_each_sources_share():
    mixture = order(weights={"a": 0.5, "b": 0.3, "c": 0.2}, sequences_per_step=1000)
    for step in range(7):
        assert Counter(name for name, _ in places(mixture, step)) == {"a": 500, "b": 300, "c": 200}


def test_weights_that_do_not_divide_a_block_are_rounded_to_its_size():
    (phase,) = order(weights={"a": 1.0, "b": 1.0, "c": 1.0}).phases
    assert sorted(phase.counts_per_block) == [333, 333, 334]


def test_the_blocks_mix_differently():
    mixture = order(sequences_per_step=1000)
    first, second, third = ([name for name, _ in places(mixture, step)] for step in range(3))
    assert first != second != third != first


def test_the_draws_of_each_source_are_counted_without_a_gap():
    samples = steps(order(block_size=30), 0, 200)
    for name in NUM_WINDOWS:
        draws = [draw for source, draw in samples if source == name]
        assert draws != []
        assert sorted(draws) == list(range(len(draws)))


def test_draws_before_a_step_are_those_of_the_steps_before():
    mixture = order(block_size=30).with_phase(
        Phase(first_batch=7, sequences_per_step=11, weights={"b": 1.0, "d": 2.0})
    )
    for step in (0, 1, 7, 8, 50):
        counts = Counter(name for name, _ in steps(mixture, 0, step))
        assert {name: n for name, n in mixture.draws_before(step).items() if n} == counts


@pytest.mark.parametrize(("name", "size"), NUM_WINDOWS.items())
def test_each_epoch_of_a_source_is_a_permutation_and_another_one(name, size):
    windows = epoch_windows(np.arange(5 * size), size, seed=0, name=name).reshape(5, size)
    assert (np.sort(windows, axis=1) == np.arange(size)).all()
    assert len({tuple(epoch) for epoch in windows.tolist()}) == 5


def test_a_sources_own_order_depends_on_its_name_and_the_seed_alone():
    draws = np.arange(37)
    first = epoch_windows(draws, 37, seed=0, name="b").tolist()
    assert epoch_windows(draws[::-1].copy(), 37, seed=0, name="b").tolist() == first[::-1]
    assert epoch_windows(draws, 37, seed=1, name="b").tolist() != first
    assert epoch_windows(draws, 37, seed=0, name="c").tolist() != first


def test_another_seed_is_another_order():
    assert steps(order(seed=0), 0, 5) != steps(order(seed=1), 0, 5)


def test_far_steps_cost_no_more_than_near_ones():
    """10**12 samples in: a table of what came before would not fit."""
    mixture = order(sequences_per_step=1000)
    assert places(mixture, 10**9, 0, 30)[10:20] == places(mixture, 10**9, 10, 20)
    assert sum(mixture.draws_before(10**9).values()) == 10**12


def test_a_new_phase_goes_on_where_every_source_stands():
    before = order(block_size=30)
    after = before.with_phase(Phase(first_batch=13, sequences_per_step=7, weights={"b": 2.0, "c": 1.0, "new": 1.0}))
    assert steps(after, 0, 13) == steps(before, 0, 13)
    samples = steps(after, 0, 60)
    for name in (*NUM_WINDOWS, "new"):
        draws = [draw for source, draw in samples if source == name]
        assert sorted(draws) == list(range(len(draws)))


def test_a_phase_of_the_same_mixture_is_none():
    mixture = order()
    (phase,) = mixture.phases
    assert mixture.with_phase(dataclasses.replace(phase, first_batch=50)).phases == mixture.phases


def test_phases_that_do_not_come_about_any_more_are_dropped():
    mixture = order().with_phase(Phase(first_batch=50, sequences_per_step=20, weights={"a": 1.0}))
    back = mixture.with_phase(Phase(first_batch=40, sequences_per_step=20, weights={"b": 1.0}))
    assert [(phase.first_batch, dict(phase.weights)) for phase in back.phases[1:]] == [(40, {"b": 1.0})]


def test_phases_are_written_and_read_back():
    mixture = order().with_phase(Phase(first_batch=50, sequences_per_step=12, weights={"a": 1.0}, block_size=10))
    again = GlobalOrder(mixture.seed, phases_of_json(json.loads(json.dumps(mixture.as_json()))))
    assert again.phases == mixture.phases
    assert steps(again, 45, 55) == steps(mixture, 45, 55)


def test_skipped_batches_are_passed_over_and_nothing_else():
    whole = order(block_size=30)
    (phase,) = whole.phases
    skipping = GlobalOrder(0, [phase], [(3, 5), (8, 8)])
    assert [skipping.batch_of(step) for step in range(8)] == [0, 1, 2, 6, 7, 9, 10, 11]
    for step in range(8):
        assert places(skipping, step) == places(whole, skipping.batch_of(step))


def test_batches_to_come_may_be_skipped_and_those_that_are_past_may_not():
    before = GlobalOrder(0, order().phases, [(3, 5)])
    assert before.with_skipped([(3, 5), (20, 20)], step=10).skipped == ((3, 5), (20, 20))
    for skipped in ([(3, 5), (7, 7)], []):
        with pytest.raises(UserError, match=r"data.skip \(.*\) must agree with .* before batch 13 \(3-5\), which is"):
            before.with_skipped(skipped, step=10)


def test_a_weight_below_the_resolution_of_a_block_is_refused():
    with pytest.raises(UserError, match=r"weight 0.0001 of source 'b' is less than one place in 1000 samples; raise"):
        order(weights={"a": 1.0, "b": 0.0001})
