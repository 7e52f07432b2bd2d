"""One optimizer step: its loss, its gradient, its clipping, its learning rate."""

import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2x import save_stock
from gpt2x.checkpoints.progress import Progress, seed_step
from gpt2x.training import loop
from gpt2x.training.steps import accumulate_losses, clip_gradients, count_targets, optimizer_step
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

SHAPE = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT2XForCausalLM(GPT2XConfig(**SHAPE, max_position_embeddings=16))


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def ragged_samples():
    """16 rows of 16 tokens of which 15, 14, ... 1 and none at all are predicted."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(48, (16, 16), generator=generator)
    labels = ids.clone()
    for row in range(16):
        labels[row, : row + 1] = -100
    labels[11, 3:9] = -100
    return ids, labels


def micro_batches(size):
    ids, labels = ragged_samples()
    return [{"input_ids": i, "labels": t} for i, t in zip(ids.split(size), labels.split(size))]


def flat_gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def naive_loss(model):
    """The mean over all predicted tokens of all rows, from the logits, in double precision."""
    ids, labels = ragged_samples()
    logits = model.double()(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].reshape(-1, 48), labels[:, 1:].reshape(-1))


@pytest.mark.parametrize("size", [16, 4, 1], ids=["1x16", "4x4", "16x1"])
def test_ragged_samples_give_the_same_gradient_however_they_are_cut(model, accelerator, size):
    reference = GPT2XForCausalLM(model.config)
    reference.load_state_dict(model.state_dict())
    expected_loss = naive_loss(reference)
    expected_loss.backward()
    loss = accumulate_losses(accelerator, model, micro_batches(size)).shares.sum()
    expected = flat_gradient(reference)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert (flat_gradient(model) - expected).norm() / expected.norm() < 1e-6


def test_the_mean_of_the_micro_batches_means_is_another_number(model):
    """Else the test above could not tell the two apart."""
    means = [model(**batch, use_cache=False).loss for batch in micro_batches(4)]
    assert abs(sum(means) / 4 - naive_loss(model)) > 1e-3


def test_targets_are_counted_after_the_shift():
    assert count_targets(torch.tensor([[5, 6, 7], [-100, -100, 8], [9, -100, -100]])) == 3


def test_the_norm_recorded_is_that_before_clipping_and_the_gradients_are_scaled(model, accelerator):
    accumulate_losses(accelerator, model, micro_batches(16))
    before = flat_gradient(model).clone()
    norm = clip_gradients(accelerator, model, 0.1)
    assert norm == pytest.approx(before.norm().item(), rel=1e-5)
    assert norm > 0.1
    torch.testing.assert_close(flat_gradient(model), before * (0.1 / before.norm()), rtol=1e-4, atol=1e-9)


def test_gradients_below_the_limit_are_left_alone(model, accelerator):
    accumulate_losses(accelerator, model, micro_batches(16))
    before = flat_gradient(model).clone()
    clip_gradients(accelerator, model, 1e4)
    assert torch.equal(flat_gradient(model), before)


def test_without_a_limit_nothing_is_clipped_and_the_norm_is_still_told(model, accelerator):
    accumulate_losses(accelerator, model, micro_batches(16))
    for parameter in model.parameters():
        parameter.grad *= 1e6
    before = flat_gradient(model).clone()
    assert clip_gradients(accelerator, model, None) == pytest.approx(before.norm().item(), rel=1e-5)
    assert torch.equal(flat_gradient(model), before)


def test_the_recorded_loss_and_norm_do_not_depend_on_the_accumulation(recipe, changed, pretrain, tmp_path):
    records = []
    for size in (8, 2, 1):
        own = changed(recipe, run={"dir": tmp_path / str(size)}, train={"micro_batch_size": size, "max_steps": 3})
        records.append([record for record in pretrain(own).records() if "train/loss" in record])
    for key in ("train/loss", "grad_norm"):
        values = [[record[key] for record in of_size] for of_size in records]
        assert values[1] == pytest.approx(values[0], rel=1e-5)
        assert values[2] == pytest.approx(values[0], rel=1e-5)


def test_a_step_moves_the_weights_by_the_clipped_gradient(recipe, changed, start):
    """Clipping after the update, or of another copy, would move them further."""
    recipe = changed(
        recipe, optimizer={"adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 1e3, "weight_decay": 0.0}
    )
    recipe = changed(recipe, optimizer={"warmup_steps": 0}, train={"max_grad_norm": 0.01})
    job, _ = start(recipe)
    before = torch.cat([parameter.detach().flatten().clone() for parameter in job.model.parameters()])
    norm = optimizer_step(job, job.batches.step(0).micro_batches).metrics["grad_norm"]
    after = torch.cat([parameter.detach().flatten() for parameter in job.model.parameters()])
    # With this epsilon AdamW divides every gradient by the same 1000, so the step is as long as the gradient.
    assert norm > 0.1
    assert (after - before).norm().item() == pytest.approx(3e-3 * 0.01 / 1e3, rel=0.1)


def test_the_learning_rate_of_every_step_is_the_schedules(recipe, pretrain):
    rates = [record["learning_rate"] for record in pretrain(recipe).records() if "train/loss" in record]
    warmup = [3e-3 * step / 4 for step in (1, 2, 3, 4)]
    decay = [3e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 16))) for step in range(16)]
    assert rates == pytest.approx(warmup + decay)


def test_a_step_is_counted_in_tokens_and_records_what_the_budget_reads(recipe, changed, pretrain):
    recipe = changed(recipe, train={"logging_steps": 5})
    assert [record["step"] for record in pretrain(recipe).records() if "train/loss" in record] == [5, 10, 15, 20]
    run = pretrain(changed(recipe, run={"name": "other"}))
    assert (run.progress.tokens, run.records()[-1]["tokens"]) == (20 * 128, 20 * 128)


@pytest.fixture
def clock(monkeypatch):
    """The loop's clock, on which every step takes two seconds."""
    seconds = itertools.count(step=2)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))


@pytest.mark.usefixtures("clock")
def test_a_time_budget_ends_before_it_is_overrun_with_the_schedule_at_its_end(recipe, changed, pretrain):
    train = {"max_steps": None, "max_time_s": 9.0}
    run = pretrain(changed(recipe, train=train, optimizer={"lr_scheduler_type": "linear", "warmup_steps": 0}))
    assert (run.progress.step, run.progress.elapsed_s) == (4, 8.0)
    rates = [record["learning_rate"] for record in run.records() if "train/loss" in record]
    assert rates == pytest.approx([3e-3 * (0.1 + 0.9 * (1 - elapsed / 9)) for elapsed in (0, 2, 4, 6)])


@pytest.mark.usefixtures("clock")
def test_a_time_budget_counts_the_time_before_a_stop(recipe, changed, pretrain):
    recipe = changed(recipe, train={"max_steps": None, "max_time_s": 9.0})
    assert pretrain(recipe, stop_after=3).progress.elapsed_s == 6.0
    resumed = pretrain(recipe)
    assert (resumed.progress.step, resumed.progress.elapsed_s) == (4, 8.0)


def test_a_clock_that_is_set_changes_no_time_budget(recipe, changed, pretrain, monkeypatch):
    days = itertools.count(time.time(), step=86_400)
    monkeypatch.setattr(time, "time", lambda: next(days))
    run = pretrain(changed(recipe, train={"max_steps": 3}))
    assert (run.progress.step, run.progress.elapsed_s) == (3, pytest.approx(30, abs=30))


def test_the_same_recipe_trains_a_model_of_transformers_to_the_same_losses(recipe, changed, pretrain, tmp_path):
    """The loop, the data order and the loss, against a plain loop over the stock class."""
    run = pretrain(changed(recipe, optimizer={"weight_decay": 0.0}, evaluation={"eval_steps": None}))
    torch.manual_seed(recipe.run.seed)
    save_stock(GPT2XForCausalLM(run.job.plain_model.config), tmp_path / "stock")
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "stock")
    assert isinstance(stock.config, GPT2Config)
    optimizer = torch.optim.AdamW(stock.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    recorded = [record for record in run.records() if "train/loss" in record]
    for step, record in enumerate(recorded[:10]):
        (batch,) = run.job.batches.step(step).micro_batches
        loss = stock(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = record["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
        assert record["train/loss"] == pytest.approx(loss.item(), abs=2e-5)


def test_the_random_numbers_of_a_step_are_its_own_and_its_ranks():
    def draws(**where):
        seed_step(where.get("seed", 1), step=where.get("step", 0), rank=where.get("rank", 0))
        return torch.rand(4).tolist()

    places = [{}, {"step": 1}, {"rank": 1}, {"seed": 2}]
    assert len({tuple(draws(**place)) for place in places}) == 4
    assert draws(step=3, rank=2) == draws(step=3, rank=2)


def test_the_largest_seed_that_numpy_takes_is_a_seed():
    seed_step(2**32 - 1, step=10**9, rank=1000)


def test_progress_adds_up():
    progress = Progress()
    for seconds in (20.0, 2.0, 1.5, 9.0):
        progress.advance(tokens=100, seconds=seconds)
    assert (progress.step, progress.tokens, progress.elapsed_s) == (4, 400, 32.5)


def test_a_step_takes_what_the_shortest_after_the_first_took():
    progress, shortest = Progress(), []
    for seconds in (20.0, 2.0, 1.5, 9.0):
        progress.advance(tokens=100, seconds=seconds)
        shortest.append(progress.step_s)
    assert shortest == [0.0, 2.0, 1.5, 1.5]
