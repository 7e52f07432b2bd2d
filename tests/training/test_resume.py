"""A run that is stopped and gone on with is the run that was never stopped, bit for bit."""

import json

import pytest
import torch

from gpt2x.checkpoints.format import newest_checkpoint
from gpt2x.distributed import devices
from gpt2x.training import steps

ADAMW = {"optimizer": {"name": "adamw"}}
MUON = {"optimizer": {"name": "muon", "muon_learning_rate": 0.02}}
DROPOUT = {"model": {"attention_dropout": 0.1, "hidden_dropout": 0.1, "embedding_dropout": 0.1}}
ACCUMULATION = {"train": {"micro_batch_size": 4}}


@pytest.fixture
def elsewhere(recipe, changed, tmp_path):
    """The same recipe in another directory."""
    return lambda: changed(recipe, run={"dir": tmp_path / "elsewhere"})


@pytest.mark.parametrize(
    "changes",
    [ADAMW, MUON, ADAMW | DROPOUT | ACCUMULATION, MUON | DROPOUT | ACCUMULATION],
    ids=["adamw", "muon", "adamw-dropout-accumulation", "muon-dropout-accumulation"],
)
def test_twenty_steps_straight_equal_ten_and_ten(recipe, changed, pretrain, assert_equal_tensors, elsewhere, changes):
    straight = pretrain(changed(recipe, **changes))
    stopped = pretrain(changed(elsewhere(), **changes), stop_after=10)
    assert (stopped.validation, stopped.progress.step) == (None, 10)
    resumed = pretrain(changed(elsewhere(), **changes))
    assert resumed.progress.step == straight.progress.step == 20
    assert_equal_tensors(resumed.saved(), straight.saved())
    assert resumed.records() == straight.records()
    assert resumed.validation == straight.validation


def test_a_run_resumed_twice_in_a_row_equals_one_without_a_stop(
    recipe, changed, pretrain, assert_equal_tensors, elsewhere
):
    changes = MUON | DROPOUT | ACCUMULATION
    straight = pretrain(changed(recipe, **changes))
    for stop_after in (3, 13, None):
        resumed = pretrain(changed(elsewhere(), **changes), stop_after=stop_after)
    assert_equal_tensors(resumed.saved(), straight.saved())
    assert resumed.records() == straight.records()


def test_a_token_budget_resumes_bit_for_bit_as_well(recipe, changed, pretrain, assert_equal_tensors, elsewhere):
    changes = {"train": {"max_steps": None, "max_tokens": 10 * 128 - 1}}
    straight = pretrain(changed(recipe, **changes))
    pretrain(changed(elsewhere(), **changes), stop_after=4)
    resumed = pretrain(changed(elsewhere(), **changes))
    assert resumed.progress.step == 10
    assert_equal_tensors(resumed.saved(), straight.saved())


def test_dropout_draws_anew_in_every_step(recipe, changed, pretrain):
    """Else the tests above would hold of a run whose seed never moves."""
    run = pretrain(changed(recipe, **DROPOUT, optimizer={"learning_rate": 1e-12}, train={"max_steps": 2}))
    losses = [record["train/loss"] for record in run.records() if "train/loss" in record]
    assert run.job.batches.step(0).checksum != run.job.batches.step(1).checksum
    assert losses[0] != losses[1]


def test_validation_and_samples_on_the_way_do_not_change_the_weights(
    recipe, changed, pretrain, assert_equal_tensors, elsewhere
):
    often = {"eval_steps": 2, "sample_steps": 3, "prompts": ["def"]}
    seldom = {"eval_steps": None, "sample_steps": None, "prompts": [], "num_validation_prompts": 0}
    watched = pretrain(changed(recipe, **DROPOUT, evaluation=often))
    unwatched = pretrain(changed(elsewhere(), **DROPOUT, evaluation=seldom))
    assert_equal_tensors(watched.saved(), unwatched.saved())


def test_no_step_is_missing_or_twice_in_the_records_after_a_stop_between_checkpoints(recipe, changed, pretrain):
    pretrain(recipe, stop_after=7)
    resumed = pretrain(recipe)
    steps = [record["step"] for record in resumed.records() if "train/loss" in record]
    assert steps == list(range(1, 21))
    assert [record["step"] for record in resumed.records() if "val/loss" in record] == [10, 20]


def test_what_was_recorded_after_the_last_checkpoint_is_recorded_again_and_not_twice(recipe, pretrain):
    stopped = pretrain(recipe, stop_after=12)
    for step in (13, 14):
        with stopped.job.run.metrics_file.open("a") as file:
            file.write(json.dumps({"step": step, "train/loss": 99.0}) + "\n")
    with stopped.job.run.samples_file.open("a") as file:
        file.write(json.dumps({"step": 14, "prompt": "", "text": "of a step that never was"}) + "\n")
    resumed = pretrain(recipe)
    assert [record["step"] for record in resumed.records() if "train/loss" in record] == list(range(1, 21))
    assert 99.0 not in [record.get("train/loss") for record in resumed.records()]
    samples = [json.loads(line) for line in resumed.job.run.samples_file.read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [20]


@pytest.mark.parametrize("torn", [b'{"step": 13, "train/lo', b'{"step": 13, "text": "caf\xc3'])
def test_a_line_torn_by_a_kill_is_dropped(recipe, pretrain, torn):
    stopped = pretrain(recipe, stop_after=12)
    for path in (stopped.job.run.metrics_file, stopped.job.run.samples_file):
        with path.open("ab") as file:
            file.write(torn)
    resumed = pretrain(recipe)
    assert [record["step"] for record in resumed.records() if "train/loss" in record] == list(range(1, 21))


def test_damaged_lines_among_the_records_are_dropped_and_told(recipe, pretrain, capsys):
    stopped = pretrain(recipe, stop_after=3)
    file = stopped.job.run.metrics_file
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], b'{"step": "2"}', b"[" * 5000, *lines[2:]]))
    resumed = pretrain(recipe, stop_after=4)
    assert [record["step"] for record in resumed.records()] == [1, 3, 4]
    assert f"{file}: 2 damaged lines are dropped." in capsys.readouterr().err


def test_a_run_killed_during_its_final_validation_and_samples_records_them_once(recipe, changed, pretrain):
    recipe = changed(recipe, evaluation={"prompts": ["def", "été"]})
    finished = pretrain(recipe)  # without stats.json, which comes last
    records, samples = finished.records(), finished.job.run.samples_file.read_text()
    again = pretrain(recipe)
    assert again.records() == records
    assert again.job.run.samples_file.read_text() == samples


def test_a_signal_during_the_final_validation_stops_the_run_without_samples(recipe, changed, pretrain):
    """The weights are saved by then; the same command validates and finishes."""
    run = pretrain(changed(recipe, evaluation={"eval_steps": None}), stop_after=21)
    assert (run.validation, run.progress.step) == (None, 20)
    assert not run.job.run.samples_file.exists()
    assert pretrain(changed(recipe, evaluation={"eval_steps": None})).validation is not None


def test_a_run_goes_on_from_a_checkpoint_from_before_its_first_update(recipe, changed, pretrain, monkeypatch):
    """Every step so far was left out, as the first ones of fp16 often are: the optimizer has no state yet."""
    recipe = changed(recipe, train={"on_non_finite": "skip", "max_steps": 4})
    original = steps.find_obstacle
    monkeypatch.setattr(steps, "find_obstacle", lambda *_, **__: "loss is nan")
    pretrain(recipe, stop_after=2)
    monkeypatch.setattr(steps, "find_obstacle", original)
    run = pretrain(recipe)
    assert (run.progress.step, run.progress.skipped_steps) == (4, 2)


# --- elsewhere -------------------------------------------------------------------------------------------------------


def resumed_lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed with")]


def test_a_run_that_goes_on_with_other_threads_says_that_it_is_equal_to_rounding(
    recipe, changed, pretrain, monkeypatch, capsys
):
    """The same command on another number of cores."""
    recipe = changed(recipe, train={"num_threads": None, "max_steps": 6})
    for cores, stop_after in ((1, 2), (2, 4)):
        monkeypatch.setattr(devices, "usable_cores", lambda _size, cores=cores: cores)
        pretrain(recipe, stop_after=stop_after)
    assert resumed_lines(capsys) == ["resumed with threads 2 (was 1): equal to rounding, not bit for bit."]
    assert pretrain(recipe).progress.step == 6
    assert resumed_lines(capsys) == []  # as the checkpoint that it went on from


def test_a_checkpoint_says_what_decides_the_last_bits(pretrain, recipe, changed):
    stopped = pretrain(changed(recipe, train={"num_threads": 2}), stop_after=2)
    checkpoint, _ = newest_checkpoint(stopped.path)
    environment = json.loads((checkpoint / "state" / "trainer.json").read_text())["environment"]
    assert {name: environment[name] for name in ("processes", "device", "threads")} == {
        "processes": 1,
        "device": "cpu",
        "threads": 2,
    }
    assert environment["torch"] == torch.__version__
    assert torch.backends.cpu.get_cpu_capability() in environment["processor"]


def test_every_change_is_named_and_what_a_checkpoint_does_not_tell_is_none():
    now = {"device": "cpu", "threads": 2, "torch": "2.13.0"}
    assert devices.describe_changes({"device": "NVIDIA H200", "torch": "2.11.0"}, now) == [
        "resumed with device cpu (was NVIDIA H200), torch 2.13.0 (was 2.11.0): equal to rounding, not bit for bit."
    ]
    assert devices.describe_changes(None, now) == devices.describe_changes(now, now) == []
