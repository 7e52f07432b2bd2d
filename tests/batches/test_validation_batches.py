"""Validation predicts every token of the split exactly once, however it is cut up."""

from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gpt2x.batches.validation import HeldOut, ValidationBatches
from gpt2x.errors import UserError

EOS = 7
SHARDS = [[20, 13], [5], [31, 2]]
NUM_TOKENS = 71


@pytest.fixture
def index(make_index):
    return make_index([[9]], SHARDS)


def validation(index, sequence_length=8, batch_size=3, rank=0, num_processes=1):
    return ValidationBatches(
        HeldOut.of(index),
        sequence_length=sequence_length,
        batch_size=batch_size,
        rank=rank,
        num_processes=num_processes,
    )


def stream(index):
    """The split's tokens with an end of text in front, as the safetensors library loads them."""
    files = [index.directory / "validation" / entry.file for entry in index.splits["validation"]]
    return [EOS] + [int(token) for file in files for token in load_file(file)["tokens"]]


def predictions(batch):
    """What a causal model is asked: (context, next token) of every label that counts, by the model's own shift."""
    asked = []
    for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        asked += [(tuple(inputs[: i + 1]), labels[i + 1]) for i in range(len(inputs) - 1) if labels[i + 1] != -100]
    return asked


def naive_predictions(index, length):
    """The same from the definition: token i follows what its window of length - 1 targets has before it."""
    tokens = stream(index)
    first = [(i - 1) // (length - 1) * (length - 1) for i in range(len(tokens))]
    return [(tuple(tokens[first[i] : i]), tokens[i]) for i in range(1, len(tokens))]


@pytest.mark.parametrize("sequence_length", [2, 5, 8, 36, 71, 72, 73, 100])
def test_every_token_is_predicted_once_from_the_tokens_before_it(index, sequence_length):
    batches = validation(index, sequence_length)
    asked = [prediction for batch in batches for prediction in predictions(batch)]
    assert asked == naive_predictions(index, sequence_length)
    assert batches.num_targets == len(asked) == NUM_TOKENS


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_the_predictions_are_the_same_for_every_batch_size_and_number_of_processes(index, batch_size, num_processes):
    ranks = [validation(index, 8, batch_size, rank, num_processes) for rank in range(num_processes)]
    asked = Counter(prediction for rank in ranks for batch in rank for prediction in predictions(batch))
    assert asked == Counter(naive_predictions(index, 8))


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_all_processes_have_as_many_batches_of_one_shape(index, num_processes):
    ranks = [validation(index, 8, 2, rank, num_processes) for rank in range(num_processes)]
    assert len({len(rank) for rank in ranks}) == 1
    assert [len(list(rank)) for rank in ranks] == [len(rank) for rank in ranks]
    assert {batch["input_ids"].shape for rank in ranks for batch in rank} == {(2, 8)}
    assert {batch["labels"].shape for rank in ranks for batch in rank} == {(2, 8)}


def test_counting_the_labels_counts_the_targets(index):
    assert sum(int((batch["labels"] != -100).sum()) for batch in validation(index)) == NUM_TOKENS


def test_going_through_twice_gives_the_same(index):
    batches = validation(index)
    for first, second in zip(batches, batches):
        assert torch.equal(first["input_ids"], second["input_ids"])
        assert first["input_ids"].dtype == first["labels"].dtype == torch.int64


def test_the_bytes_are_those_of_the_documents(index):
    assert validation(index).num_bytes == 3 * NUM_TOKENS


@pytest.mark.parametrize("num_documents", [1, 3, 5, 9])
@pytest.mark.parametrize("length", [1, 10, 100])
def test_the_beginnings_are_those_of_different_documents_without_their_end(index, num_documents, length):
    tokens, documents = stream(index)[1:], []
    for size in np.concatenate(SHARDS):
        documents.append(tokens[: size - 1])
        tokens = tokens[size:]
    found = validation(index).document_beginnings(num_documents, length)
    chosen = [next(i for i, ids in enumerate(documents) if ids[:length] == beginning) for beginning in found]
    assert len(set(chosen)) == len(found) == min(num_documents, 5)


def test_the_beginnings_are_always_the_same_and_of_longer_documents_first(index):
    found = validation(index).document_beginnings(5, 11)
    assert found == validation(index, 5, 1, 1, 2).document_beginnings(5, 11)
    assert [len(ids) for ids in found[:3]] == [11] * 3
    assert sorted(len(ids) for ids in found[3:]) == [1, 4]


def test_a_window_without_room_for_a_target_is_refused(index):
    with pytest.raises(UserError, match=r"data.sequence_length \(1\) must be at least 2 to predict a token"):
        validation(index, sequence_length=1)


def test_data_without_validation_is_refused(make_index):
    with pytest.raises(UserError, match=r"holds no validation tokens; prepare it again with corpus.validation_fract"):
        validation(make_index([[9]]))
