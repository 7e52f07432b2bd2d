"""Validation against a loop over single tokens."""

import math

import pytest
import torch

from gpt2x.evaluation import validate

NUM_BYTES = 333
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
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / NUM_BYTES, rel=1e-6)
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
    assert validate(model, batch, num_bytes=1, accelerator=accelerator).token_accuracy == 1.0
    batch = [{"input_ids": half[:, :5], "labels": half[:, :5]}]
    assert validate(model, batch, num_bytes=1, accelerator=accelerator).token_accuracy == 3 / 4


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
