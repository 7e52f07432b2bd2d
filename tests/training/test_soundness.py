"""A state that is not sound never takes the place of one that is."""

import json
import math

import pytest
import torch

from gpt2x.checkpoints.format import list_checkpoints
from gpt2x.checkpoints.state import first_not_finite
from gpt2x.errors import UserError
from gpt2x.training import loop, steps
from gpt2x.training.anomalies import find_unsound

# Every step is saved, and only the newest kept: a save that should not be would take the last good one.
EACH = {"save_steps": 1, "save_total_limit": 1}


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture
def blow_up(monkeypatch):
    """``blow_up(6, value)``: the sixth update leaves this value in the weights, its loss and gradient being finite."""

    def install(number, value):
        original, calls = loop.optimizer_step, []

        def blowing(job, micro_batches):
            outcome = original(job, micro_batches)
            calls.append(None)
            if len(calls) == number:
                with torch.no_grad():
                    for weight in job.plain_model.parameters():
                        weight.fill_(value)
            return outcome

        monkeypatch.setattr(loop, "optimizer_step", blowing)

    return install


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_saved(recipe, changed, pretrain, blow_up, value):
    recipe = changed(recipe, train=EACH)
    blow_up(6, value)
    message = (
        r"^step 6: model\.\S+ is not finite; the state after step 6 is not saved, and no checkpoint was deleted: with "
        r"a lower learning rate \(optimizer.learning_rate\) and --resume the same command goes on from "
        r".*/checkpoints/step-000005\.$"
    )
    with pytest.raises(UserError, match=message):
        pretrain(recipe)
    path = recipe.run.dir / "tiny"
    assert "step-000005" in names(path)
    assert "step-000006" not in names(path)
    again = pretrain(changed(recipe, optimizer={"learning_rate": 1e-3}, resume=True))
    assert again.progress.step == 20


def test_finite_weights_without_a_finite_loss_give_way_to_the_checkpoint_before(recipe, changed, pretrain, blow_up):
    """They are saved, as nobody knows yet; the next step finds out, and the good ones are still there."""
    recipe = changed(recipe, train=EACH)
    blow_up(6, 1e30)
    message = (
        r"^step 7: loss is (nan|inf) on rank 0.*, and the weights before it are not sound: the loss of a validation "
        r"batch is .*; \S+/step-000006 holds it and is set aside as step-000006\.kept-1; the state after step 6 is "
        r"not saved, .*"
        r"the same command goes on from \S+/step-000005\.$"
    )
    with pytest.raises(UserError, match=message):
        pretrain(recipe)
    assert names(recipe.run.dir / "tiny")[-2:] == ["step-000005", "step-000006.kept-1"]
    again = pretrain(changed(recipe, optimizer={"learning_rate": 1e-3}, resume=True))
    assert [path.name for path in list_checkpoints(again.path)] == ["step-000020"]
    assert [record["step"] for record in again.records() if "train/loss" in record] == list(range(1, 21))


def test_a_last_step_that_ruins_the_weights_is_no_end_of_a_run(recipe, changed, pretrain, blow_up):
    recipe = changed(recipe, train={"save_steps": 4, "save_total_limit": 1})
    blow_up(20, 1e30)
    message = r"^step 20: the validation loss is .*step-000020 holds it and is set aside .* from \S+/step-000016\.$"
    with pytest.raises(UserError, match=message):
        pretrain(recipe)
    assert pretrain(changed(recipe, optimizer={"learning_rate": 1e-3}, resume=True)).validation is not None


def test_without_an_older_checkpoint_the_same_command_starts_anew(recipe, changed, pretrain, blow_up, monkeypatch):
    recipe = changed(recipe, train={"save_steps": None})
    blow_up(3, math.nan)
    with pytest.raises(UserError, match=r"^step 4: loss is nan .*--resume the same command starts anew\.$"):
        pretrain(recipe)
    again = pretrain(changed(recipe, optimizer={"learning_rate": 1e-3}, resume=True), stop_after=2)
    assert [record["step"] for record in again.records()] == [1, 2]


def test_an_optimizer_that_is_not_finite_is_not_sound(recipe, start):
    job, _ = start(recipe)
    steps.optimizer_step(job, job.batches.step(0).micro_batches)
    assert find_unsound(job) is None
    weight = next(job.plain_model.parameters())
    job.optimizers[0].state[weight]["exp_avg_sq"][0, 0] = math.inf
    assert find_unsound(job) == "model.embed_tokens.weight/exp_avg_sq is not finite"


def test_large_numbers_whose_sum_overflows_are_finite():
    assert first_not_finite([("a", torch.full((4,), 3e38)), ("b", torch.ones(3, dtype=torch.int64))]) is None
    assert first_not_finite([("a", torch.ones(2)), ("b", torch.tensor([math.inf, -math.inf]))]) == "b"


def test_every_line_that_a_run_leaves_is_strict_json(finished):
    def refuse(constant):
        raise AssertionError(constant)

    for file in [*finished.path.rglob("*.json"), *finished.path.rglob("*.jsonl")]:
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=refuse)
