"""Gradients scaled for fp16 under one optimizer and two: a real scaler in a real Accelerator, on the CPU, which
accelerate itself does not put there."""

import hashlib
import itertools
import json
import math

import pytest
import torch
from accelerate import Accelerator

from gpt2x.checkpoints.format import newest_checkpoint
from gpt2x.distributed import devices
from gpt2x.errors import UserError
from gpt2x.training import steps

INIT_SCALE, GROWTH_INTERVAL = 1024.0, 4
OPTIMIZERS = ["adamw", "muon"]


@pytest.fixture(autouse=True)
def fp16_on_the_cpu(monkeypatch):
    """Makes of each run's Accelerator what it is on a GPU in fp16: autocast to float16, and a scaler."""

    def make(**options):
        accelerator = Accelerator(**options)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE, growth_interval=GROWTH_INTERVAL)
        return accelerator

    monkeypatch.setattr(devices, "Accelerator", make)


@pytest.fixture
def spoil(monkeypatch):
    """``spoil(3, where=0)``: the gradient of one parameter overflows in the third step."""

    def install(*numbers, where=0, value=math.inf):
        original, count = steps.accumulate_losses, itertools.count(1)

        def spoiled(accelerator, model, micro_batches):
            losses = original(accelerator, model, micro_batches)
            if next(count) in numbers:
                list(model.parameters())[where].grad.view(-1)[0] = value
            return losses

        monkeypatch.setattr(steps, "accumulate_losses", spoiled)

    return install


def weights_of(job):
    return {name: weight.clone() for name, weight in job.plain_model.state_dict().items()}


def take(job, number):
    return steps.optimizer_step(job, job.batches.step(number).micro_batches)


def scaler_state(run_dir):
    checkpoint, _ = newest_checkpoint(run_dir)
    trainer = json.loads((checkpoint / "state" / "trainer.json").read_text())
    return trainer["scaler"]["scale"], trainer["scaler"]["_growth_tracker"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_step_is_the_step_of_float32_gradients_unscaled_and_clipped_once(recipe, changed, start, name):
    """Against torch: the same gradients, not scaled, clipped by torch, in optimizers that know of no scaler."""
    job, _ = start(changed(recipe, optimizer={"name": name}, train={"max_grad_norm": 0.05}))
    model, optimizers = job.plain_model, [optimizer.optimizer for optimizer in job.optimizers]
    before = weights_of(job)
    states = [optimizer.state_dict() for optimizer in optimizers]
    outcome = take(job, 0)
    found, rates = weights_of(job), [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    model.load_state_dict(before)
    (batch,) = job.batches.step(0).micro_batches
    targets = (batch["labels"][:, 1:] != -100).sum()
    loss = job.model(**batch, num_items_in_batch=targets, return_logits=False, use_cache=False).loss
    (loss * INIT_SCALE).backward()  # gradients of another scale are rounded otherwise in float16
    for parameter in model.parameters():
        parameter.grad /= INIT_SCALE
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    for optimizer, state, own_rates in zip(optimizers, states, rates, strict=True):
        optimizer.load_state_dict(state)
        for group, rate in zip(optimizer.param_groups, own_rates, strict=True):
            group["lr"] = rate
        optimizer.step()
    assert outcome.metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert outcome.metrics["grad_norm"] > 0.05
    torch.testing.assert_close(found, weights_of(job), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", [0, -1, 4], ids=["embedding", "last norm", "matrix of a layer"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_where_one_gradient_overflows_no_optimizer_moves_and_the_scale_is_halved_once(
    recipe, changed, start, spoil, name, where
):
    spoil(2, where=where)
    job, _ = start(changed(recipe, optimizer={"name": name}))
    assert not take(job, 0).has_overflowed
    before, moments = weights_of(job), [str(optimizer.state_dict()) for optimizer in job.optimizers]
    outcome = take(job, 1)
    assert (outcome.has_overflowed, outcome.obstacle, outcome.metrics["grad_norm"]) == (True, None, math.inf)
    assert all(torch.equal(weight, before[key]) for key, weight in weights_of(job).items())
    assert [str(optimizer.state_dict()) for optimizer in job.optimizers] == moments
    assert job.accelerator.scaler.get_scale() == INIT_SCALE / 2
    assert not take(job, 2).has_overflowed
    assert all(not torch.equal(weight, before[key]) for key, weight in weights_of(job).items() if weight.ndim == 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_scale_grows_after_as_many_whole_steps_as_it_should(recipe, changed, pretrain, name):
    run = pretrain(changed(recipe, optimizer={"name": name}, train={"max_steps": 2 * GROWTH_INTERVAL + 1}))
    scales = [record["train/loss_scale"] for record in run.records() if "train/loss" in record]
    assert scales == [INIT_SCALE] * GROWTH_INTERVAL + [2 * INIT_SCALE] * GROWTH_INTERVAL + [4 * INIT_SCALE]


def test_steps_that_the_scaler_leaves_out_are_counted_apart(recipe, changed, pretrain, spoil):
    spoil(2, 3, 7)
    run = pretrain(changed(recipe, optimizer={"name": "muon"}, train={"max_steps": 8}))
    records = [record for record in run.records() if "train/loss" in record]
    assert [record.get("train/scaler_skipped_steps", 0) for record in records] == [0, 1, 2, 2, 2, 2, 3, 3]
    assert [record["grad_norm"] is None for record in records] == [False, True, True, False, False, False, True, False]
    assert [record["train/loss_scale"] for record in records] == [1024, 1024, 512, 256, 256, 256, 256, 128]
    assert not any("train/skipped_steps" in record for record in records)
    assert (run.progress.skipped_steps, run.progress.scaler_skipped_steps) == (0, 3)
    assert not run.job.run.spikes_file.exists()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scale_growth_and_counts_resume_bit_for_bit(
    recipe, changed, pretrain, spoil, assert_equal_tensors, tmp_path, name
):
    """Stopped between two growths, after an overflow."""
    recipe = changed(recipe, optimizer={"name": name}, train={"max_steps": 12})
    spoil(3)
    straight = pretrain(recipe)
    elsewhere = changed(recipe, run={"dir": tmp_path / "elsewhere"})
    spoil(3)
    stopped = pretrain(elsewhere, stop_after=5)
    assert scaler_state(stopped.path) == (INIT_SCALE / 2, 2)
    spoil()
    resumed = pretrain(elsewhere)
    assert scaler_state(resumed.path) == scaler_state(straight.path)
    assert_equal_tensors(resumed.saved(), straight.saved())
    assert resumed.records() == straight.records()
    assert (resumed.progress.scaler_skipped_steps, straight.progress.scaler_skipped_steps) == (1, 1)


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(recipe, changed, pretrain, spoil):
    """From 1024 the scale comes down to 1 in ten steps; it would go on to 0, and nothing would ever be trained."""
    spoil(*range(3, 20), value=math.nan)
    with pytest.raises(UserError, match=r"^step 13: gradient norm is nan on rank 0, samples 0 to 7 of batch 12, from"):
        pretrain(changed(recipe, optimizer={"name": "muon"}))
    assert scaler_state(recipe.run.dir / "tiny") == (1.0, 0)


@pytest.mark.parametrize("what", ["no target", "loss"])
def test_a_step_that_the_scale_has_nothing_to_do_with_leaves_weights_and_scale_alone(
    recipe, changed, start, monkeypatch, what
):
    original = steps.accumulate_losses

    def spoiled(accelerator, model, micro_batches):
        if what == "no target":
            micro_batches = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in micro_batches]
        losses = original(accelerator, model, micro_batches)
        if what == "loss":
            losses.shares.mul_(math.nan)
        return losses

    monkeypatch.setattr(steps, "accumulate_losses", spoiled)
    job, _ = start(changed(recipe, optimizer={"name": "muon"}))
    before = weights_of(job)
    for number in range(GROWTH_INTERVAL + 1):  # each finds the gradients of its own scale
        assert take(job, number).obstacle == {"no target": "no token to predict", "loss": "loss is nan"}[what]
    assert all(torch.equal(weight, before[key]) for key, weight in weights_of(job).items())
    state = job.accelerator.scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (INIT_SCALE, 0)


def test_a_checkpoint_from_before_there_was_this_count_is_gone_on_with(recipe, changed, pretrain, start):
    stopped = pretrain(recipe, stop_after=3)
    checkpoint, _ = newest_checkpoint(stopped.path)
    file = checkpoint / "state" / "trainer.json"
    trainer = json.loads(file.read_text())
    del trainer["scaler_skipped_steps"]
    file.write_text(json.dumps(trainer))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"]["state/trainer.json"] = {"size": file.stat().st_size, "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    _, progress = start(recipe)
    assert (progress.step, progress.scaler_skipped_steps) == (3, 0)
