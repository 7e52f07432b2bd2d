"""Steps that must not move the weights, losses out of the ordinary, and what may fail without ending the run."""

import itertools
import json
import math
import shutil
import statistics
import time

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from gpt2x import preflight
from gpt2x.checkpoints.saver import HostCopies
from gpt2x.errors import UserError
from gpt2x.training import evaluators, steps
from gpt2x.training import finish as finish_module
from gpt2x.training.anomalies import WINDOW, SpikeDetector
from gpt2x.training.disk import Room, check_room, measure_room
from gpt2x.training.finish import finish
from gpt2x.training.loop import train
from gpt2x.training.recording import Failures

# --- not finite ------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoil(monkeypatch):
    """``spoil(step, gradient=...)``: puts something into the gradient of a step, or a factor before its loss."""

    def install(*numbers, gradient=None, loss=None):
        original, count = steps.accumulate_losses, itertools.count(1)

        def spoiled(accelerator, model, micro_batches):
            losses = original(accelerator, model, micro_batches)
            if next(count) in numbers:
                if gradient is not None:
                    next(model.parameters()).grad[0, 0] = gradient
                if loss is not None:
                    losses.shares.mul_(loss)
            return losses

        monkeypatch.setattr(steps, "accumulate_losses", spoiled)

    return install


FAULTS = {
    "loss is nan": {"loss": math.nan},
    "loss is inf": {"loss": math.inf},
    "gradient norm is inf": {"gradient": math.inf},
}


@pytest.mark.parametrize("reason", FAULTS)
def test_what_is_not_finite_stops_the_run_with_the_state_before_the_step_saved(
    recipe, pretrain, spoil, assert_equal_tensors, changed, tmp_path, reason
):
    """Fault 18."""
    spoil(6, **FAULTS[reason])
    message = rf"^step 6: {reason} on rank 0, samples 0 to 7 of batch 5, from train: epoch 0, .*tokens \d+ to"
    with pytest.raises(UserError, match=message):
        pretrain(recipe)
    before = pretrain(changed(recipe, run={"dir": tmp_path / "before"}), stop_after=5)
    spoiled = recipe.run.dir / "tiny"
    assert json.loads((spoiled / "spikes.jsonl").read_text())["reason"] == reason
    resumed = pretrain(recipe)
    assert resumed.progress.step == 20
    assert_equal_tensors(pretrain(changed(recipe, run={"dir": tmp_path / "before"})).saved(), resumed.saved())
    assert before.progress.step == 5


def test_a_skipped_step_leaves_weights_and_optimizer_alone_and_is_counted(recipe, changed, start, spoil):
    spoil(1, gradient=math.nan)
    job, _ = start(changed(recipe, train={"on_non_finite": "skip"}))
    before = {name: weight.clone() for name, weight in job.plain_model.state_dict().items()}
    outcome = steps.optimizer_step(job, job.batches.step(0).micro_batches)
    assert outcome.obstacle == "gradient norm is nan"
    assert all(torch.equal(weight, before[name]) for name, weight in job.plain_model.state_dict().items())
    assert [dict(optimizer.state) for optimizer in job.optimizers] == [{}]
    assert all(weight.grad is None for weight in job.plain_model.parameters())


def test_skipping_goes_on_with_the_counts_in_the_metrics_and_the_schedule_as_it_was(recipe, changed, pretrain, spoil):
    spoil(3, 4, 9, loss=math.nan)
    run = pretrain(changed(recipe, train={"on_non_finite": "skip", "max_skipped_steps": 2}))
    records = [record for record in run.records() if "train/loss" in record]
    assert [record["step"] for record in records if record["train/loss"] is None] == [3, 4, 9]
    assert [record.get("train/skipped_steps", 0) for record in records] == [0, 0, 1] + [2] * 5 + [3] * 12
    assert (run.progress.step, run.progress.skipped_steps, run.progress.tokens) == (20, 3, 20 * 128)
    assert records[8]["learning_rate"] == pytest.approx(3e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * 4 / 16))))


def test_after_too_many_skipped_steps_in_a_row_the_run_stops(recipe, changed, pretrain, spoil):
    spoil(3, 5, 6, 7, loss=math.nan)
    message = (
        r"step 7: loss is nan, after 2 such steps in a row \(train.max_skipped_steps\) on rank 0, .*--data.skip 6"
    )
    with pytest.raises(UserError, match=message):
        pretrain(changed(recipe, train={"on_non_finite": "skip", "max_skipped_steps": 2}))


def test_the_message_names_the_number_by_which_the_batch_is_passed_over(recipe, changed, pretrain, spoil):
    spoil(6, loss=math.nan)
    with pytest.raises(UserError, match=r"--data.skip 5, both with --resume"):
        pretrain(recipe)
    spoiled = pretrain(recipe, stop_after=6).job.batches.step(5).checksum
    without = pretrain(changed(recipe, run={"name": "without"}, data={"skip": "5"}))
    assert spoiled not in [record.get("data/checksum") for record in without.records()]


def test_a_step_without_a_token_to_predict_is_skipped_and_counted(recipe, pretrain, monkeypatch):
    """Fault 19: the mean over no token is not a number, and weight decay alone would move the weights."""
    original, count = steps.accumulate_losses, itertools.count(1)

    def masked(accelerator, model, micro_batches):
        if next(count) == 3:
            micro_batches = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in micro_batches]
        return original(accelerator, model, micro_batches)

    monkeypatch.setattr(steps, "accumulate_losses", masked)
    run = pretrain(recipe)
    records = [record for record in run.records() if "train/loss" in record]
    assert (records[2]["train/loss"], records[2]["grad_norm"], records[2]["train/skipped_steps"]) == (0.0, 0.0, 1)
    assert all(record["train/loss"] > 1 for record in records if record["step"] != 3)
    assert not run.job.run.spikes_file.exists()


# --- spikes ----------------------------------------------------------------------------------------------------------


def test_a_spike_stands_six_deviations_above_the_median_of_the_last_losses():
    generator, detector, losses = torch.Generator().manual_seed(0), SpikeDetector(), []
    for _ in range(300):
        loss = 3 + 0.1 * torch.randn((), generator=generator).item()
        assert not detector.is_spike(loss)
        detector.count(loss)
        losses.append(loss)
    median = sorted(losses[-WINDOW:])[WINDOW // 2]
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in losses[-WINDOW:])
    assert (detector.median(), detector.deviation()) == (median, pytest.approx(deviation))
    assert deviation == pytest.approx(0.1, rel=0.2)
    assert not detector.is_spike(median + 5.5 * deviation)
    assert detector.is_spike(median + 7 * deviation)


def is_next_a_spike(detector, loss):
    """As the loop asks: of a loss that is not yet among the last ones."""
    found = detector.is_spike(loss)
    detector.count(loss)
    return found


def test_one_spike_does_not_hide_the_next():
    detector = SpikeDetector()
    for number in range(100):
        detector.count(3 + 0.01 * (number % 7))
    assert [is_next_a_spike(detector, loss) for loss in (9.0, 9.0, 3.0, 4.0)] == [True, True, False, True]


def test_the_first_losses_are_never_a_spike():
    detector = SpikeDetector()
    assert not any(is_next_a_spike(detector, loss) for loss in [3.0, 9.0] * 10)


def test_a_spike_is_written_down_with_its_worst_samples(recipe, changed, pretrain, monkeypatch):
    original, count = steps.accumulate_losses, itertools.count(1)

    def spiking(accelerator, model, micro_batches):
        losses = original(accelerator, model, micro_batches)
        if next(count) == 40:
            losses.shares[2] += 50
        return losses

    monkeypatch.setattr(steps, "accumulate_losses", spiking)
    train = {"max_steps": 45, "micro_batch_size": 2, "save_steps": None}
    run = pretrain(changed(recipe, train=train, evaluation={"eval_steps": None}))
    (spike,) = [json.loads(line) for line in run.job.run.spikes_file.read_text().splitlines()]
    assert (spike["step"], spike["batch"], spike["reason"]) == (40, 39, "loss spike")
    assert spike["loss"] > 50 > spike["median"] > spike["deviation"] > 0
    (suspect,) = spike["suspects"]
    assert (suspect["rank"], suspect["places"]) == (0, [4, 5])
    assert suspect["samples"] == [run.job.batches.batches.locate(39, place) for place in (4, 5)]


def test_the_mean_loss_of_a_suspect_is_that_of_its_own_tokens(recipe, changed, start):
    job, _ = start(changed(recipe, train={"micro_batch_size": 2}))
    batches = job.batches.step(0).micro_batches
    batches[1] = batches[1] | {"labels": batches[1]["labels"].masked_fill(torch.arange(16) < 9, -100)}
    means = steps.accumulate_losses(job.accelerator, job.model, batches).means()
    with torch.no_grad():
        expected = [job.plain_model(**batch, use_cache=False).loss.item() for batch in batches]
    assert means.tolist() == pytest.approx(expected, rel=1e-5)


# --- what may fail ---------------------------------------------------------------------------------------------------


def test_a_failing_tracker_sampler_and_plot_end_no_run_and_are_listed(recipe, changed, start, monkeypatch, capsys):
    """Fault 25, as far as training goes."""
    job, _ = start(changed(recipe, train={"max_steps": 6}, evaluation={"sample_steps": 3, "eval_steps": None}))

    def broken(*_arguments, **_options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(Accelerator, "log", broken)
    monkeypatch.setattr(evaluators, "sample_texts", broken)
    monkeypatch.setattr(finish_module, "write_plots", broken)
    with job.recorder:
        found = train(job)
    finish(job, found)
    assert job.recorder.failures.summary() == [
        "tracker failed 7 x, last: ConnectionError: no route to host",
        "sampling failed 2 x, last: ConnectionError: no route to host",
        "plots failed 1 x, last: ConnectionError: no route to host",
    ]
    assert job.run.stats_file.exists()
    assert job.model.training
    said = capsys.readouterr().out
    assert said.count("tracker failed (ConnectionError: no route to host); the run goes on.") == 1


def test_only_what_is_tolerated_is_tolerated():
    said = []
    failures = Failures(said.append)
    with failures.tolerated("push"):
        raise OSError("413")
    with pytest.raises(KeyboardInterrupt), failures.tolerated("push"):
        raise KeyboardInterrupt
    assert (said, failures.summary()) == (
        ["push failed (OSError: 413); the run goes on."],
        ["push failed 1 x, last: OSError: 413"],
    )


def test_metrics_that_cannot_be_written_end_the_run_with_the_file_and_the_reason(recipe, start):
    job, _ = start(recipe)
    job.run.metrics_file.mkdir()
    with pytest.raises(UserError, match=r"tiny/metrics.jsonl could not be written \(Is a directory\); mend that"):
        job.recorder.record({"train/loss": 1.0})


def test_waiting_for_data_is_said_once_a_minute(recipe, start, capsys):
    recorder = start(recipe)[0].recorder
    for waited_s, seconds in ((0.4, 0.5), (0.6, 10.0), (2.5, 5.0), (2.5, 5.0)):
        recorder.note_waiting(waited_s, seconds)
    said = [line for line in capsys.readouterr().out.splitlines() if "waits" in line]
    assert said == [
        "training waits for its data: 2.5 s of a step of 5.0 s; raise data.num_workers and data.prefetch_steps, or "
        "put the data on a faster disk."
    ]


# --- room ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_estimate_of_a_checkpoint_is_what_it_takes(recipe, changed, pretrain, name):
    run = pretrain(changed(recipe, optimizer={"name": name}, train={"save_total_limit": 1}))
    room = measure_room(run.job)
    (checkpoint,) = (run.path / "checkpoints").iterdir()
    tensors = sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors"))
    assert room.checkpoint_bytes == pytest.approx(tensors, rel=0.05)
    assert room.model_bytes == pytest.approx((checkpoint / "model" / "model.safetensors").stat().st_size, rel=0.05)


@pytest.mark.parametrize(
    ("train", "optimizer", "counts"),
    [
        ({"save_steps": 10, "save_total_limit": 2}, {}, (3, 0)),
        ({"save_steps": 10, "save_total_limit": 9}, {}, (4, 0)),
        ({"save_steps": None}, {}, (2, 0)),
        ({"save_steps": 5, "keep_steps": 10, "save_best": True}, {"lr_scheduler_type": "wsd"}, (5, 2)),
        ({"save_steps": 5, "save_total_limit": None}, {}, (2, 5)),
        ({"save_steps": 5, "save_total_limit": None, "max_steps": None, "max_time_s": 9.0}, {}, (2, None)),
    ],
)
def test_the_checkpoints_that_will_be_there_are_counted(recipe, changed, start, train, optimizer, counts):
    room = measure_room(start(changed(recipe, train=train, optimizer=optimizer))[0])
    assert (room.num_kept, room.num_for_ever) == counts


SAVING = {
    "copies while training goes on": (
        4,
        False,
        "; copies for saving take 2 MB of host memory, from the first step on",
    ),
    "a save at the end alone": (None, False, " free"),
    "shards": (None, True, "; each save takes 2 MB of the main process's host memory"),
}


@pytest.mark.parametrize("name", SAVING)
def test_the_plan_says_what_a_save_takes_of_memory(recipe, changed, start, monkeypatch, name):
    save_steps, is_sharded, end = SAVING[name]
    larger = {"hidden_size": 80}
    job, _ = start(changed(recipe, train={"save_steps": save_steps}, model=larger))
    monkeypatch.setattr(preflight, "is_sharded", lambda model: is_sharded)
    (line,) = [line for line in preflight.describe(job).splitlines() if line.startswith("saving:")]
    assert line.endswith(end), line


ROOM = {"checkpoint_bytes": 3_000_000_000, "model_bytes": 1_000_000_000, "num_kept": 3, "num_for_ever": 0}


def test_a_run_that_the_disk_cannot_hold_is_refused_with_the_numbers(tmp_path):
    message = (
        r"3 checkpoints of 3,000,000,000 bytes and the final model need 10,010,000,000 bytes, 9,000,000,000 are free; "
        r"make room, lower train.save_total_limit, or set run.dir."
    )
    with pytest.raises(UserError, match=message):
        check_room(Room(**ROOM, free_bytes=9_000_000_000), tmp_path)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({}, None),
        (
            {"num_for_ever": 10},
            "all 13 checkpoints will need 40,010,000,000 bytes, 11,000,000,000 are free: make room",
        ),
        ({"num_for_ever": None}, "every checkpoint is kept (train.save_total_limit null): watch the disk."),
    ],
)
def test_a_disk_that_may_become_full_is_a_warning(tmp_path, changes, warning):
    found = check_room(Room(**(ROOM | changes), free_bytes=11_000_000_000), tmp_path)
    assert found is None if warning is None else warning in found


# --- a damaged model to go on from -----------------------------------------------------------------------------------

DAMAGES = {
    "header": r"is damaged \(.*header.*\); restore it, or give another model",
    "missing tensor": r"lacks .*attn.weight, which a gpt2 model needs",
    "another shape": r"attn.weight of the shape \(3, 3\), and by its config it has",
    "extra tensor": r"attn.gate.weight, which a gpt2 model has no place for",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_to_go_on_from_is_refused_before_the_first_step(
    recipe, changed, finished, start, tmp_path, damage
):
    """Fault 11."""
    # As a model of somebody else, which has no manifest.
    shutil.copytree(finished.path / "final", tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json"))
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = next(name for name in tensors if name.endswith("c_attn.weight"))
    if damage == "header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    else:
        weight = tensors.pop(name)
        if damage == "another shape":
            tensors[name] = torch.ones(3, 3)
        elif damage == "extra tensor":
            tensors |= {name: weight, name.replace("attn.c_attn", "attn.gate"): torch.ones(3, 3)}
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=DAMAGES[damage]):
        start(changed(recipe, init_from=str(tmp_path / "model")))


# --- copies ----------------------------------------------------------------------------------------------------------


def test_copies_keep_the_values_of_the_moment_and_their_memory_is_used_again():
    tied = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": tied, "b": tied, "c": torch.ones(3)}
    copies = HostCopies()
    copies.reserve(tensors.items())
    first = copies.take(tensors.items())
    places = [first["a"].data_ptr(), first["c"].data_ptr()]
    tied.add_(1)
    assert torch.equal(first["a"], torch.arange(6.0).reshape(2, 3))
    assert first["a"] is first["b"]
    second = copies.take(tensors.items())
    assert torch.equal(second["b"], tied)
    assert [second["a"].data_ptr(), second["c"].data_ptr()] == places


def test_tensors_that_are_made_one_after_the_other_in_the_same_memory_are_told_apart():
    """As where a sharded model is gathered piece by piece."""
    copies = HostCopies().take((str(number), torch.full((1000,), float(number))) for number in range(20))
    assert [copy[0].item() for copy in copies.values()] == list(range(20))


@pytest.mark.parametrize("slow", ["copying", "writing"])
def test_weights_that_move_while_a_checkpoint_is_made_do_not_move_in_it(recipe, changed, pretrain, monkeypatch, slow):
    """The copy is slower than a step, or the writer than several: the checkpoint is that of its own step."""
    owner, name = {"copying": (HostCopies, "take"), "writing": (safetensors.torch, "save_file")}[slow]
    recipe = changed(recipe, train={"save_steps": 5, "save_total_limit": None})
    expected = pretrain(changed(recipe, run={"name": "expected"}))
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: (time.sleep(0.2), original(*arguments))[1])
    run = pretrain(recipe)
    for step in (5, 10, 15, 20):
        for file in ("model/model.safetensors", "state/optimizer.safetensors"):
            parts = [path / "checkpoints" / f"step-{step:06d}" / file for path in (run.path, expected.path)]
            assert parts[0].read_bytes() == parts[1].read_bytes()
