"""Validation predicts every token of the split exactly once, however it is cut up."""

import dataclasses
import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gpt2x.batches.validation import HeldOut, ValidationBatches
from gpt2x.errors import UserError
from gpt2x.shards.files import write_shard

EOS = 7
SHARDS = [[20, 13], [5], [31, 2]]
NUM_TOKENS = 71


@pytest.fixture
def index(make_index):
    return make_index([[9]], SHARDS)


def validation(index, sequence_length=8, batch_size=3, rank=0, num_processes=1, packing="continuous"):
    """Of an index, or of a mixture of them by their names."""
    held_out = {name: HeldOut.of(part) for name, part in index.items()} if isinstance(index, dict) else None
    return ValidationBatches(
        held_out or HeldOut.of(index),
        sequence_length=sequence_length,
        batch_size=batch_size,
        rank=rank,
        num_processes=num_processes,
        packing=packing,
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
    assert validation(index).num_bytes == {"validation": 3 * NUM_TOKENS}


@pytest.fixture
def chat(make_index):
    return make_index([[9]], [[20, 13, 1], [5], [31, 2]], name="chat", learned=0.5)


def naive_documents(index):
    """What whole documents ask: every learned token but the first of each, from its own document alone."""
    asked = []
    for entry in index.splits["validation"]:
        shard = load_file(index.directory / "validation" / entry.file)
        targets = shard.get("targets", np.ones(len(shard["tokens"])))
        for start, end in zip(shard["documents"][:-1], shard["documents"][1:]):
            ids = shard["tokens"][start:end].tolist()
            asked += [(tuple(ids[:i]), ids[i]) for i in range(1, len(ids)) if targets[start + i]]
    return asked


def own_predictions(batches):
    """What a causal model is asked that masks documents where positions begin again."""
    asked = []
    for batch in batches:
        for inputs, labels, positions in zip(*(batch[k].tolist() for k in ("input_ids", "labels", "position_ids"))):
            for i in range(1, len(inputs)):
                if labels[i] != -100:
                    asked.append((tuple(inputs[i - 1 - positions[i - 1] : i]), labels[i]))
                    assert positions[i] == positions[i - 1] + 1
    return asked


@pytest.mark.parametrize(("batch_size", "num_processes"), [(1, 1), (3, 2), (2, 5), (50, 1)])
@pytest.mark.parametrize("kind", ["index", "chat"])
def test_whole_documents_are_predicted_once_from_themselves_alone(request, kind, batch_size, num_processes):
    index = request.getfixturevalue(kind)
    ranks = [
        validation(index, 32, batch_size, rank, num_processes, "whole_documents") for rank in range(num_processes)
    ]
    asked = [prediction for rank in ranks for prediction in own_predictions(rank)]
    assert Counter(asked) == Counter(naive_documents(index))
    assert {rank.num_targets for rank in ranks} == {len(asked)}
    assert {batch["labels"].shape for rank in ranks for batch in rank} == {(batch_size, 32)}


@pytest.mark.parametrize("sequence_length", [2, 8, 36, 100])
def test_what_a_conversation_does_not_teach_is_context_only(chat, sequence_length):
    files = [chat.directory / "validation" / entry.file for entry in chat.splits["validation"]]
    targets = np.concatenate([load_file(file)["targets"] for file in files])
    expected = [
        pair for pair, learned in zip(naive_predictions(chat, sequence_length), targets, strict=True) if learned
    ]
    batches = validation(chat, sequence_length)
    assert [prediction for batch in batches for prediction in predictions(batch)] == expected
    assert batches.num_targets == len(expected) == targets.sum()


def test_masked_conversations_are_told_apart_by_their_bounds(chat):
    batches = validation(chat, 100, packing="documents")
    assert Counter(own_predictions(batches)) == Counter(naive_documents(chat))
    assert batches.num_targets == len(naive_documents(chat))


@pytest.mark.parametrize("packing", ["continuous", "documents"])
def test_a_row_of_a_mixture_holds_nothing_of_another_source(index, chat, packing):
    batches = validation({"web": index, "chat": chat}, 8, 3, packing=packing)
    asked = {0: [], 1: []}
    for batch in batches:
        for row, source in enumerate(batch["sources"].tolist()):
            asked[source] += predictions({name: tensor[row : row + 1] for name, tensor in batch.items()})
    alone = [
        [p for batch in validation(part, 8, packing=packing) for p in predictions(batch)] for part in (index, chat)
    ]
    assert list(asked.values()) == alone
    assert batches.num_targets == sum(map(len, alone))
    assert batches.num_bytes == {"web": 213, "chat": 216}


@pytest.mark.parametrize(("batch_size", "num_processes"), [(1, 1), (3, 2), (2, 5), (50, 2)])
def test_the_rows_of_a_mixture_go_to_the_same_source_however_they_are_cut(index, chat, batch_size, num_processes):
    mixture = {"web": index, "chat": chat}
    ranks = [validation(mixture, 8, batch_size, rank, num_processes) for rank in range(num_processes)]
    found = Counter()
    for batch in (batch for rank in ranks for batch in rank):
        for row, source in enumerate(batch["sources"].tolist()):
            asked = predictions({name: tensor[row : row + 1] for name, tensor in batch.items()})
            found.update((source, prediction) for prediction in asked)
    expected = [
        (number, p) for number, part in enumerate((index, chat)) for b in validation(part, 8) for p in predictions(b)
    ]
    assert found == Counter(expected)


def test_a_source_of_whose_held_out_documents_nothing_is_learned_is_refused(index, make_index):
    unlearned = make_index([[9]], [[9]], name="unlearned", learned=0.0)
    complaint = r"source 'chat': no token of the held-out documents is learned; prepare conversations in which the "
    with pytest.raises(UserError, match=complaint):
        validation({"web": index, "chat": unlearned})


def test_a_held_out_document_that_must_be_whole_and_does_not_fit_is_refused(index):
    complaint = r"validation/tokens_part_00002.safetensors: document 0 has 31 tokens, .* \(30\) must hold it whole; "
    with pytest.raises(UserError, match=complaint):
        validation(index, 30, packing="whole_documents")


@pytest.mark.parametrize("num_documents", [1, 3, 6, 9])
def test_the_beginning_of_a_conversation_goes_up_to_what_is_learned(chat, num_documents):
    expected = []
    for entry in chat.splits["validation"]:
        shard = load_file(chat.directory / "validation" / entry.file)
        for start, end in zip(shard["documents"][:-1], shard["documents"][1:]):
            first = next((i for i in range(start, end) if shard["targets"][i]), start)  # or nothing is learned
            stop = first if first > start else min(start + 3, end - 1)
            expected.append(shard["tokens"][start:stop].tolist())
    found = validation(chat).document_beginnings(num_documents, 3)
    assert len(found) == min(num_documents, 6)
    assert Counter(map(str, found)) - Counter(map(str, expected)) == Counter()


def test_the_beginning_of_a_document_without_an_end_of_text_is_all_of_it(index):
    file = index.directory / "validation" / "tokens_part_00001.safetensors"
    arrays = load_file(file)
    arrays["tokens"][-1] = EOS + 1
    write_shard(file, tokens=arrays["tokens"], documents=arrays["documents"], metadata={"tokenizer_fingerprint": "f"})
    entry = index.splits["validation"][1]
    entries = [dataclasses.replace(entry, sha256=hashlib.sha256(file.read_bytes()).hexdigest())]
    cut = dataclasses.replace(index, splits=index.splits | {"validation": entries})
    assert validation(cut).document_beginnings(1, 100) == [arrays["tokens"].tolist()]


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
