"""A source's windows are the consecutive pieces of its shards, and its ids are known to fit the model."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from gpt2x.batches.source import ShardSource
from gpt2x.errors import UserError


def naive_windows(index, split, length):
    """Every window, one after the other, from the arrays that the safetensors library loads."""
    windows = []
    for entry in index.splits[split]:
        tokens = load_file(index.directory / split / entry.file)["tokens"].tolist()
        windows += [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    return windows


@pytest.mark.parametrize("length", [1, 4, 9, 30])
def test_windows_are_the_consecutive_pieces_of_each_shard(make_index, length):
    index = make_index([[20, 13], [5], [31], [9, 9]])
    source = ShardSource(index, length)
    expected = naive_windows(index, "train", length)
    assert source.num_windows == len(expected)
    assert source.windows.sequences(np.arange(source.num_windows)).ids.tolist() == expected


def test_windows_come_in_the_order_asked_for_and_as_often(make_index):
    index = make_index([[20, 13], [5], [31], [9, 9]])
    expected = naive_windows(index, "train", 4)
    indices = np.random.default_rng(1).integers(0, len(expected), 50)
    assert ShardSource(index, 4).windows.sequences(indices).ids.tolist() == [expected[i] for i in indices]


def test_windows_are_int64_and_may_be_none(make_index):
    source = ShardSource(make_index([[20]]), 4)
    none = source.windows.sequences(np.array([], np.int64)).ids
    assert none.shape == (0, 4)
    assert none.dtype == np.int64


def test_all_tokens_are_counted_also_those_short_of_a_window(make_index):
    source = ShardSource(make_index([[20, 13], [3]]), 10)
    assert (source.num_tokens, source.num_windows) == (36, 3)


def test_the_fingerprint_changes_with_the_content_only(make_index):
    index = make_index([[20]], [[20]])
    train, again = (ShardSource(index, length) for length in (4, 5))
    assert train.fingerprint == again.fingerprint != ShardSource(index, 4, split="validation").fingerprint


def test_an_id_outside_the_model_is_refused_at_once(make_index):
    index = make_index([[300], [300]])
    tokens = load_file(index.directory / "train" / "tokens_part_00000.safetensors")["tokens"]
    limit = int(tokens.max())
    position = int(tokens.argmax())
    with pytest.raises(
        UserError, match=rf"00000.safetensors: token id {limit} at position {position} .* of {limit}; "
    ):
        ShardSource(dataclasses.replace(index, vocab_size=limit), 4)


def test_shards_shorter_than_a_window_are_refused_with_the_longest_that_works(make_index):
    with pytest.raises(UserError, match=r"no shard of train has the 40 tokens of data.sequence_length; set it to 33"):
        ShardSource(make_index([[20], [20, 13]]), 40)


@pytest.mark.parametrize("length", [3, 8, 25])
def test_aligned_windows_begin_where_documents_begin_and_never_overlap(make_index, length):
    index = make_index([[20, 13, 4, 4, 4, 30], [5, 40]])
    source = ShardSource(index, length, align_documents=True)
    expected = []
    for entry in index.splits["train"]:
        arrays, end = load_file(index.directory / "train" / entry.file), 0
        for start in arrays["documents"][:-1].tolist():
            if start >= end and start + length <= len(arrays["tokens"]):
                expected.append(arrays["tokens"][start : start + length].tolist())
                end = start + length
    assert expected != []
    assert source.windows.sequences(np.arange(source.num_windows)).ids.tolist() == expected


def test_each_epoch_gives_every_window_once(make_index):
    source = ShardSource(make_index([[20, 13], [5], [31], [9, 9]]), 4, seed=5)
    windows = sorted(source.windows.sequences(np.arange(source.num_windows)).ids.tolist())
    for epoch in range(3):
        draws = np.arange(epoch * source.num_windows, (epoch + 1) * source.num_windows)
        assert sorted(source.sequences(draws).ids.tolist()) == windows
        assert source.epochs(int(draws[-1]) + 1) == epoch + 1
