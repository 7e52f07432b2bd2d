"""Validation against a loop over single tokens."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2x.batches.validation import HeldOut, ValidationBatches
from gpt2x.evaluation.validation import validate
from gpt2x.shards.files import Shard

NUM_BYTES = {"validation": 333}
# Rows of 12 tokens with the first ones, the last ones or all of them not counted.
LENGTHS = [12, 9, 5, 1, 12, 7, 3]


def rows():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(257, (len(LENGTHS), 12), generator=generator)
    labels = ids.clone()
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = -100
    labels[4, :5] = -100
    return ids, labels


def batches(size):
    ids, labels = rows()
    return [{"input_ids": i, "labels": t} for i, t in zip(ids.split(size), labels.split(size))]


def naive(model):
    """(nats, hits, tokens), every token predicted by a forward pass over what stands before it."""
    model.eval()
    nats, hits, tokens = 0.0, 0, 0
    for ids, labels in zip(*rows()):
        for position in range(1, 12):
            if labels[position] != -100:
                with torch.no_grad():
                    logits = model(input_ids=ids[None, :position], use_cache=False).logits[0, -1].double()
                nats -= torch.log_softmax(logits, -1)[ids[position]].item()
                hits += int(logits.argmax() == ids[position])
                tokens += 1
    model.train()
    return nats, hits, tokens


def test_validation_equals_a_loop_over_single_tokens(model, accelerator):
    nats, hits, tokens = naive(model)
    found = validate(model, batches(4), num_bytes=NUM_BYTES, accelerator=accelerator)
    assert found.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert found.token_accuracy == hits / tokens
    assert found.num_tokens == tokens == 11 + 8 + 4 + 0 + 7 + 6 + 2
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 333, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_result_does_not_depend_on_the_batch_size(model, accelerator, size):
    whole = validate(model, batches(7), num_bytes=NUM_BYTES, accelerator=accelerator)
    cut = validate(model, batches(size), num_bytes=NUM_BYTES, accelerator=accelerator)
    assert cut.metrics() == pytest.approx(whole.metrics(), rel=1e-6)


def test_the_token_accuracy_is_the_share_of_tokens_ranked_first(model, accelerator):
    """On what the model itself would write that share is one."""
    ids = torch.tensor([[5]])
    with torch.no_grad():
        for _ in range(7):
            ids = torch.cat([ids, model.eval()(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    half = ids.clone()
    half[0, 4:] = (half[0, 4:] + 1) % 257
    batch = [{"input_ids": ids, "labels": ids}]
    assert validate(model, batch, num_bytes={"validation": 1}, accelerator=accelerator).token_accuracy == 1.0
    batch = [{"input_ids": half[:, :5], "labels": half[:, :5]}]
    assert validate(model, batch, num_bytes={"validation": 1}, accelerator=accelerator).token_accuracy == 3 / 4


@pytest.mark.parametrize("is_training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(model, accelerator, is_training):
    model.train(is_training)
    validate(model, batches(4), num_bytes=NUM_BYTES, accelerator=accelerator)
    assert model.training == is_training


def test_the_random_state_is_left_as_it_was(model, accelerator):
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    validate(model, batches(4), num_bytes=NUM_BYTES, accelerator=accelerator)
    assert torch.equal(torch.rand(3), expected)


def test_validation_leaves_no_gradients(model, accelerator):
    validate(model, batches(4), num_bytes=NUM_BYTES, accelerator=accelerator)
    assert {parameter.grad for parameter in model.parameters()} == {None}


def test_a_wish_to_stop_ends_it_without_a_result(model, accelerator):
    answers = iter([False, True])
    found = validate(model, batches(1), num_bytes=NUM_BYTES, accelerator=accelerator, is_stopped=lambda: next(answers))
    assert found is None
    assert model.training


def test_the_record_names_what_the_run_directory_promises(model, accelerator):
    found = validate(model, batches(4), num_bytes=NUM_BYTES, accelerator=accelerator)
    assert list(found.metrics()) == ["val/loss", "val/bits_per_byte", "val/perplexity", "val/token_accuracy"]


EOS = 256


def held_out(lengths, *, seed, learned):
    """A source of documents of random bytes, of which a share is learned; all of plain ones (None)."""
    generator = np.random.default_rng(seed)
    bounds = np.cumsum([0, *lengths])
    tokens = generator.integers(0, 256, bounds[-1]).astype(np.uint16)
    tokens[bounds[1:] - 1] = EOS
    targets = None if learned is None else (generator.random(tokens.size) < learned).astype(np.uint8)
    shard = Shard(file=Path("memory"), tokens=tokens, bounds=bounds, targets=targets)
    return HeldOut(shards=[shard], num_bytes=int(tokens.size) - len(lengths), eos_token_id=EOS)


SOURCES = {
    "web": held_out([20, 3, 1, 9, 17, 5], seed=0, learned=None),
    "chat": held_out([13, 24, 2, 8, 31], seed=1, learned=0.5),
    "code": held_out([11], seed=2, learned=None),
}


def naive_documents(model, source):
    """(nats, hits, tokens) of what is learned, each document run alone."""
    (shard,) = source.shards
    targets = np.ones(shard.tokens.size) if shard.targets is None else shard.targets
    nats, hits, tokens = 0.0, 0, 0
    for start, end in zip(shard.bounds[:-1], shard.bounds[1:]):
        ids = torch.from_numpy(shard.tokens[start:end].astype(np.int64))
        with torch.no_grad():
            logits = model.eval()(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
        for position, row in enumerate(logits, start=1):
            if targets[start + position]:
                nats -= torch.log_softmax(row, -1)[ids[position]].item()
                hits += int(row.argmax() == ids[position])
                tokens += 1
    return nats, hits, tokens


def packed(source, **options):
    return ValidationBatches(
        source, **{"sequence_length": 32, "batch_size": 2, "packing": "whole_documents"} | options
    )


def validated(model, accelerator, *ranks):
    """What the ranks find together: the batches of all of them, one after the other."""
    batches = [batch for rank in ranks for batch in rank]
    return validate(model, batches, num_bytes=ranks[0].num_bytes, accelerator=accelerator)


@pytest.mark.parametrize("name", ["web", "chat"])
def test_whole_documents_have_the_loss_of_each_document_alone(model, accelerator, name):
    nats, hits, tokens = naive_documents(model, SOURCES[name])
    batches = packed(SOURCES[name])
    found = validated(model, accelerator, batches)
    assert found.num_tokens == batches.num_targets == tokens
    assert found.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert found.token_accuracy == hits / tokens
    assert found.sources == {}


def test_each_source_of_a_mixture_has_its_own_result_and_together_the_whole(model, accelerator):
    naive = {name: naive_documents(model, source) for name, source in SOURCES.items()}
    found = validated(model, accelerator, packed(SOURCES))
    assert list(found.sources) == ["web", "chat", "code"]
    for name, (nats, hits, tokens) in naive.items():
        source = found.sources[name]
        assert source.loss == pytest.approx(nats / tokens, rel=1e-6)
        assert source.bits_per_byte == pytest.approx(nats / math.log(2) / SOURCES[name].num_bytes, rel=1e-6)
        assert source.token_accuracy == hits / tokens
        assert source.num_tokens == tokens
    nats, hits, tokens = (sum(counts) for counts in zip(*naive.values()))
    num_bytes = sum(source.num_bytes for source in SOURCES.values())
    assert found.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert found.token_accuracy == hits / tokens
    assert found.num_tokens == tokens


@pytest.mark.parametrize("packing", ["continuous", "documents", "whole_documents"])
def test_a_source_has_the_same_result_in_a_mixture_as_alone(model, accelerator, packing):
    found = validated(model, accelerator, packed(SOURCES, packing=packing))
    for name, source in SOURCES.items():
        alone = validated(model, accelerator, packed(source, packing=packing))
        assert found.sources[name].num_tokens == alone.num_tokens
        assert found.sources[name].metrics() == pytest.approx(alone.metrics(), rel=1e-6)


@pytest.mark.parametrize(("batch_size", "num_processes"), [(1, 1), (3, 2), (7, 1), (2, 4)])
@pytest.mark.parametrize("packing", ["continuous", "documents", "whole_documents"])
def test_the_results_of_a_mixture_depend_on_neither_batch_size_nor_processes(
    model, accelerator, batch_size, num_processes, packing
):
    whole = validated(model, accelerator, packed(SOURCES, packing=packing, batch_size=50))
    cut = [
        packed(SOURCES, packing=packing, batch_size=batch_size, rank=rank, num_processes=num_processes)
        for rank in range(num_processes)
    ]
    found = validated(model, accelerator, *cut)
    assert found.metrics() == pytest.approx(whole.metrics(), rel=1e-6)
    counts = [{name: source.num_tokens for name, source in result.sources.items()} for result in (found, whole)]
    assert counts[0] == counts[1]


def test_the_record_of_a_mixture_names_its_sources(model, accelerator):
    found = validated(model, accelerator, packed({name: SOURCES[name] for name in ("web", "chat")}))
    assert list(found.metrics())[4:] == [
        f"val/{name}/{metric}" for name in ("web", "chat") for metric in ("loss", "bits_per_byte", "token_accuracy")
    ]
    assert found.metrics()["val/chat/bits_per_byte"] == found.sources["chat"].bits_per_byte


def test_documents_without_bytes_have_no_bits_per_byte(model, accelerator):
    found = validate(model, batches(4), num_bytes={"validation": 0}, accelerator=accelerator)
    assert math.isnan(found.bits_per_byte)
