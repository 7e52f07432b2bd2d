"""The order is a pure function of (seed, mixture, position), exact in its weights, and each epoch a permutation."""

from collections import Counter

import numpy as np
import pytest

from gpt2x.batches.order import GlobalOrder, permute, round_keys
from gpt2x.errors import UserError


def order(num_windows=(100, 37, 11), weights=(6.0, 3.0, 1.0), seed=0, **fields):
    names = tuple("abcdefgh"[: len(num_windows)])
    return GlobalOrder(seed=seed, names=names, num_windows=num_windows, weights=weights, **fields)


def positions(order, start, stop):
    """What stands there, as pairs (source, window)."""
    return list(zip(*(part.tolist() for part in order.sample_positions(start, stop))))


def naive_positions(order, count):
    """The definition in the order's docstring, position by position, with nothing but the permutation shared."""
    per_block = dict(enumerate(order.counts_per_block))
    places = [source for source, number in per_block.items() for _ in range(number)]
    drawn, found = Counter(), []
    for position in range(count):
        block, place = divmod(position, order.block_size)
        keys = round_keys(order.seed, "block", block)
        source = places[permute(np.array([place]), order.block_size, keys)[0]]
        epoch, draw = divmod(drawn[source], order.num_windows[source])
        keys = round_keys(order.seed, "source", order.names[source], epoch)
        found.append((source, permute(np.array([draw]), order.num_windows[source], keys)[0]))
        drawn[source] += 1
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
    mixture = order(block_size=20)
    assert positions(mixture, 0, 400) == naive_positions(mixture, 400)


def test_any_piece_of_the_order_is_that_piece():
    mixture = order(block_size=20)
    whole = positions(mixture, 0, 500)
    for start, stop in [(0, 1), (19, 21), (137, 139), (41, 333), (499, 500), (60, 60)]:
        assert positions(mixture, start, stop) == whole[start:stop]


def test_every_block_has_exactly_each_sources_share():
    mixture = order(weights=(0.6, 0.3, 0.1))
    sources, _ = mixture.sample_positions(0, 7000)
    for block in sources.reshape(7, 1000):
        assert np.bincount(block).tolist() == [600, 300, 100]


def test_weights_that_do_not_divide_a_block_are_rounded_to_its_size():
    mixture = order(weights=(1.0, 1.0, 1.0))
    assert sorted(mixture.counts_per_block) == [333, 333, 334]


def test_the_blocks_mix_differently():
    sources, _ = order().sample_positions(0, 3000)
    first, second, third = sources.reshape(3, 1000).tolist()
    assert first != second != third != first


@pytest.mark.parametrize("source", [0, 1, 2])
def test_each_epoch_of_each_source_is_a_permutation_and_another_one(source):
    mixture = order()
    sources, windows = mixture.sample_positions(0, 20_000)
    drawn, size = windows[sources == source], mixture.num_windows[source]
    epochs = drawn[: drawn.size // size * size].reshape(-1, size)
    assert len(epochs) > 3
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_a_sources_own_order_does_not_depend_on_the_others():
    sources, windows = order().sample_positions(0, 3000)
    alone = GlobalOrder(seed=0, names=("b",), num_windows=(37,))
    drawn = windows[sources == 1]
    assert drawn.tolist() == alone.sample_positions(0, drawn.size)[1].tolist()


def test_another_seed_is_another_order():
    assert positions(order(seed=0), 0, 100) != positions(order(seed=1), 0, 100)


def test_far_positions_cost_no_more_than_near_ones():
    """10**12 samples in: a table of what came before would not fit."""
    mixture = order(num_windows=(10**9, 37, 11))
    start = 10**12 + 7
    assert positions(mixture, start, start + 30)[10:20] == positions(mixture, start + 10, start + 20)


def test_without_weights_sources_count_by_their_windows():
    class Named:
        def __init__(self, name, num_windows):
            self.name, self.num_windows = name, num_windows

    mixture = GlobalOrder.of([Named("a", 300), Named("b", 100)], seed=0)
    assert mixture.counts_per_block == (750, 250)


def test_a_weight_below_the_resolution_of_a_block_is_refused():
    with pytest.raises(UserError, match=r"weight 0.0001 of source 'b' is less than one place in 1000 samples; raise"):
        order(num_windows=(5, 5), weights=(1.0, 0.0001))


def test_sources_of_the_same_name_are_refused():
    with pytest.raises(UserError, match=r"the sources' names \(a, a\) must differ; rename one"):
        GlobalOrder(seed=0, names=("a", "a"), num_windows=(5, 5), weights=(1.0, 1.0))
