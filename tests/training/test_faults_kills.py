"""Killed or asked to stop at a named point, out of room, beside another run: nothing is lost, and the run ends as it
would have. Faults 1 to 7, 18, 19, 22 and 24 of docs/faults.md; the long ones are in
tests/trials/test_faults.py."""

import json
import os
import re
import signal
import socket
import time

import pytest
from forked_runs import ForkedRuns, files_of, read_records, read_tensors

from gpt2x import files
from gpt2x.checkpoints.format import list_checkpoints, newest_checkpoint
from gpt2x.config import to_yaml
from gpt2x.errors import UserError
from gpt2x.runs.directory import locked

# Killed there, a run of 12 steps that saves every four has at least the checkpoint of step 4.
POINTS = [
    "gpt2x.checkpoints.saver:HostCopies.take:before:2",
    "gpt2x.training.trainee:save_model:after:2",
    "gpt2x.manifest:sha256_of:after:20",
    "gpt2x.files:sync:before:40",
    "gpt2x.checkpoints.retention:remove_checkpoints:before:2",
    "gpt2x.training.steps:count_targets:after:14",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    forked = ForkedRuns(tmp_path_factory.mktemp("output"))
    yield forked
    forked.close()


@pytest.fixture
def write_recipe(recipe, changed):
    """Writes tiny.yaml: 12 steps of two micro-batches with dropout, saved every four, validated and sampled every six.

    Returns the script's arguments and the run's directory.
    """

    def write(directory, **changes):
        directory.mkdir(parents=True, exist_ok=True)
        train = {"max_steps": 12, "save_steps": 4, "micro_batch_size": 4, "save_total_limit": 1}
        written = changed(
            recipe,
            run={"dir": directory / "runs"},
            model={"hidden_dropout": 0.1},
            train=train | changes.pop("train", {}),
            evaluation={"eval_steps": 6, "sample_steps": 6, "prompts": ["def"]},
        )
        (directory / "tiny.yaml").write_text(to_yaml(changed(written, **changes)))
        return ("--config", directory / "tiny.yaml"), directory / "runs" / "tiny"

    return write


@pytest.fixture
def assert_ends_alike(runs, write_recipe, tmp_path_factory, assert_equal_tensors):
    """Runs the command to its end and compares what it leaves with what an undisturbed run does."""
    command, expected = write_recipe(tmp_path_factory.getbasetemp() / "straight")
    if not expected.exists():
        code, output = runs.run(*command)
        assert code == 0, output

    def check(command, run_dir):
        code, output = runs.run(*command)
        assert code == 0, output
        assert files_of(run_dir) == files_of(expected)
        last = "checkpoints/step-000012"
        assert_equal_tensors(read_tensors(run_dir / last), read_tensors(expected / last))
        assert read_records(run_dir) == read_records(expected)
        assert (run_dir / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()

    return check


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_of_a_save_or_a_step_it_ends_as_if_it_had_not_been(
    runs, write_recipe, tmp_path, assert_ends_alike, point
):
    """Faults 1 and 2."""
    command, run_dir = write_recipe(tmp_path)
    assert runs.run(*command, at=f"{point}:SIGKILL")[0] == -signal.SIGKILL
    checkpoint, passed_over = newest_checkpoint(run_dir)
    assert (checkpoint is not None, passed_over) == (True, [])
    assert_ends_alike(command, run_dir)


# --- signals ---------------------------------------------------------------------------------------------------------

PHASES = {
    "step": ("gpt2x.training.loop:optimizer_step:before:3:SIGTERM", 3),
    "evaluation": ("gpt2x.evaluation.validation:_batch_sums:before:1:SIGTERM", 6),
    "sampling": ("gpt2x.training.evaluators:sample_texts:before:1:SIGTERM", 6),
    "save": ("gpt2x.training.trainer:Trainer.whole_state:before:2:SIGTERM", 5),
}


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_any_phase_saves_that_step_and_the_same_command_ends_alike(
    runs, write_recipe, tmp_path, assert_ends_alike, phase
):
    """Fault 3, of one rank."""
    (command, run_dir), (point, step) = write_recipe(tmp_path), PHASES[phase]
    code, output = runs.run(*command, at=point)
    assert (code, "Traceback" in output) == (143, False), output
    assert "SIGTERM: saving after this step; once more to leave at once." in output
    assert output.splitlines()[-1] == f"stopped at step {step}; the same command goes on from there."
    assert newest_checkpoint(run_dir)[0] == run_dir / "checkpoints" / f"step-{step:06d}"
    assert_ends_alike(command, run_dir)


@pytest.mark.parametrize(
    "point",
    [
        "gpt2x.training.checks:open_file_source:before:1",
        "gpt2x.training.trainee:make_model:after:1",
        "gpt2x.training.steps:count_targets:after:1",
        "gpt2x.training.finish:write_final:before:1",
    ],
)
def test_where_there_is_nothing_to_save_ctrl_c_leaves_in_one_line(runs, write_recipe, tmp_path, point):
    """While data are checked, the model is made, the first step runs (or compiles), the final model is written."""
    command, _ = write_recipe(tmp_path, train={"max_steps": 1})
    code, output = runs.run(*command, at=f"{point}:SIGINT")
    assert (code, "Traceback" in output) == (130, False), output
    assert "SIGINT: nothing to save, leaving." in output.splitlines()
    assert runs.run(*command)[0] == 0


def test_a_second_ctrl_c_during_the_save_leaves_at_once_with_the_older_checkpoint(
    runs, write_recipe, tmp_path, assert_ends_alike
):
    """Fault 5."""
    command, run_dir = write_recipe(tmp_path)
    points = ["gpt2x.training.loop:optimizer_step:before:6", "gpt2x.checkpoints.format:write_manifest:before:2"]
    code, output = runs.run(*command, at=[f"{point}:SIGINT" for point in points])
    assert (code, "Traceback" in output) == (130, False), output
    assert list_checkpoints(run_dir) == [run_dir / "checkpoints" / "step-000004"]
    assert_ends_alike(command, run_dir)


def test_sigusr1_saves_after_the_step_and_the_run_goes_on(runs, write_recipe, tmp_path):
    command, run_dir = write_recipe(tmp_path, train={"save_total_limit": None})
    code, output = runs.run(*command, at="gpt2x.training.loop:optimizer_step:before:2:SIGUSR1")
    assert code == 0
    assert "SIGUSR1: saving after this step, and going on." in output
    assert [path.name for path in list_checkpoints(run_dir)] == [f"step-{step:06d}" for step in (2, 4, 8, 12)]


def test_sigterm_to_one_rank_stops_both_at_the_same_step(runs, write_recipe, tmp_path):
    """Fault 4: rank 1 is asked in the middle of a step."""
    command, run_dir = write_recipe(tmp_path, train={"max_steps": 5000, "save_steps": None})
    run = runs.start(*command, num_processes=2)
    metrics = run_dir / "metrics.jsonl"
    run.wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2)  # both have finished a step
    run.send(signal.SIGTERM, rank=1)
    assert run.wait_for_all()[1] == 143
    assert "SIGTERM: saving after this step" in run.output(rank=1)
    (checkpoint,) = list_checkpoints(run_dir)
    step = json.loads((checkpoint / "state" / "trainer.json").read_text())["step"]
    assert run.output().splitlines()[-1] == f"stopped at step {step}; the same command goes on from there."
    assert 0 < step < 5000


@pytest.mark.parametrize("phase", ["evaluation", "sampling"])
def test_sigterm_to_all_ranks_while_they_evaluate_or_sample_saves_that_step_once(runs, write_recipe, tmp_path, phase):
    """Fault 3, of two ranks, as a launcher does it."""
    (command, run_dir), (point, step) = write_recipe(tmp_path), PHASES[phase]
    run = runs.start(*command, at=point, num_processes=2)
    assert run.wait_for_all() == [143, 143], run.output()
    assert run.output().splitlines()[-1] == f"stopped at step {step}; the same command goes on from there."
    assert "Traceback" not in run.output() + run.output(rank=1)
    assert newest_checkpoint(run_dir)[0] == run_dir / "checkpoints" / f"step-{step:06d}"
    run = runs.start(*command, num_processes=2)
    assert run.wait_for_all() == [0, 0], run.output()
    steps = [record["step"] for record in read_records(run_dir) if "train/loss" in record]
    assert steps == list(range(1, 13))


def test_where_one_rank_is_killed_the_other_ends_by_itself_and_the_same_command_goes_on(runs, write_recipe, tmp_path):
    command, run_dir = write_recipe(tmp_path, train={"max_steps": 5000})
    run = runs.start(*command, num_processes=2)
    run.wait_until(lambda: list_checkpoints(run_dir))
    run.send(signal.SIGKILL, rank=1)
    codes = run.wait_for_all()
    assert codes[0] != 0
    assert codes[1] == -signal.SIGKILL
    checkpoint, passed_over = newest_checkpoint(run_dir)
    assert passed_over == []
    step = int(checkpoint.name[5:])
    run = runs.start(*command, f"--train.max_steps={step + 2}", "--resume=true", num_processes=2)
    assert run.wait_for_all() == [0, 0]
    assert f"resumed at step {step:,}" in run.output()


def test_where_the_data_of_one_of_three_ranks_ends_all_stop_at_that_step_with_the_run_saved(
    runs, write_recipe, tmp_path
):
    """Fault 22."""
    command, run_dir = write_recipe(tmp_path, train={"tokens_per_step": 192})
    run = runs.start(*command, patch="rank_patches:end_the_data_of_rank_one", num_processes=3)
    assert run.wait_for_all() == [1, 1, 1]
    last = [run.output(rank=rank).splitlines()[-1] for rank in range(3)]
    assert last[1] == "error: the stream of this machine has ended."
    assert last[0] == last[2] == "error: the data of another process has ended; see its message."
    assert newest_checkpoint(run_dir)[0] == run_dir / "checkpoints" / "step-000005"
    assert runs.start(*command, num_processes=3).wait_for_all() == [0, 0, 0]
    records = [record for record in read_records(run_dir) if "train/loss" in record]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert len({record["data/checksum"] for record in records}) == 12


def test_a_run_that_was_moved_to_another_directory_goes_on_there(runs, write_recipe, tmp_path, assert_ends_alike):
    command, run_dir = write_recipe(tmp_path)
    code, output = runs.run(*command, at="gpt2x.training.loop:optimizer_step:before:7:SIGTERM")
    assert code == 143, output
    (tmp_path / "elsewhere").mkdir()
    moved = run_dir.rename(tmp_path / "elsewhere" / "tiny")
    assert_ends_alike((*command, f"--run.dir={moved.parent}"), moved)


# --- one writer ------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_directory_leaves_at_once_and_names_the_first(runs, write_recipe, tmp_path):
    """Fault 24."""
    command, run_dir = write_recipe(tmp_path)
    with locked(run_dir):
        code, output = runs.run(*command)
    line = (
        f"error: {run_dir} is being written by process {os.getpid()} on {socket.gethostname()}; wait for it, or start "
        f"another run with --run.name NAME.\n"
    )
    assert (code, output) == (1, line)
    assert files_of(run_dir) == set()


def test_a_lock_of_an_older_version_and_a_lease_without_a_heartbeat_keep_nobody_out(
    recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(files, "LEASE_S", 0.3)
    monkeypatch.setattr(files, "SILENT_S", 0.1)
    with locked(tmp_path):
        record = (tmp_path / "run.lease").read_text()
    (tmp_path / "run.lease").write_text(record.replace(socket.gethostname(), "elsewhere"))
    (tmp_path / "run.lock").write_text(json.dumps({"pid": 17, "host": "elsewhere", "since": "2026-01-01 00:00:00"}))
    with locked(tmp_path):
        pass
    said = f"waiting for process {os.getpid()} on elsewhere, which has {tmp_path}/run.lock, for a sign of life"
    assert capsys.readouterr().err.startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_says_so_whatever_lock_lies_there(runs, write_recipe, tmp_path):
    """Killed between its last file and the end of its lock; then brought to another machine."""
    command, run_dir = write_recipe(tmp_path, train={"max_steps": 1})
    code, _ = runs.run(*command, at="gpt2x.training.finish:write_stats:after:1:SIGKILL")
    assert (code, (run_dir / "run.lock").exists()) == (-signal.SIGKILL, True)
    files_there = files_of(run_dir)
    line = f"{run_dir} is finished; its model is in {run_dir}/final. Start another with --run.name NAME.\n"
    assert runs.run(*command) == (0, line)
    lease = (run_dir / "run.lease").read_text()
    (run_dir / "run.lease").write_text(lease.replace(socket.gethostname(), "elsewhere"))
    assert runs.run(*command) == (0, line)
    assert files_of(run_dir) == files_there


def test_of_many_processes_that_start_in_the_same_moment_one_gets_the_directory(tmp_path):
    start = time.monotonic() + 0.3
    pids = [os.fork() for _ in range(8) if os.getpid() == PARENT] if (PARENT := os.getpid()) else []
    if os.getpid() != PARENT:
        time.sleep(max(start - time.monotonic(), 0))
        try:
            with locked(tmp_path / "run"):
                time.sleep(0.5)
            os._exit(0)
        except UserError:
            os._exit(1)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert sorted(codes) == [0] + [1] * 7


def test_a_directory_that_cannot_be_written_to_is_refused_before_the_first_step(runs, write_recipe, tmp_path):
    """Fault 7."""
    command, _ = write_recipe(tmp_path)
    (tmp_path / "file").touch()
    code, output = runs.run(*command, f"--run.dir={tmp_path}/file")
    line = f"error: {tmp_path}/file/tiny cannot be written to (Not a directory); make it writable, or set run.dir.\n"
    assert (code, output) == (1, line)


# --- room ------------------------------------------------------------------------------------------------------------


def test_a_save_without_room_keeps_the_older_checkpoint_and_stops_with_numbers(
    runs, write_recipe, tmp_path, assert_ends_alike
):
    """Fault 6, with one checkpoint kept."""
    command, run_dir = write_recipe(tmp_path)
    code, output = runs.run(*command, patch="run_patches:limit_files")
    assert (code, "Traceback" in output) == (1, False), output
    line = (
        rf"error: {run_dir}/checkpoints/step-000008 could not be saved \(.*File too large.*\): it needs [\d,]+ bytes, "
        r"[\d,]+ are free; older checkpoints are kept. Make room, and the same command goes on from the newest."
    )
    assert re.fullmatch(line, output.splitlines()[-1])
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000004"]
    assert_ends_alike(command, run_dir)


# --- not finite, or empty, on one of two ranks -----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_before_the_step(runs, write_recipe, tmp_path):
    """Fault 18."""
    command, run_dir = write_recipe(tmp_path, train={"micro_batch_size": 2})
    run = runs.start(*command, patch="run_patches:poison_rank_one", num_processes=2)
    assert run.wait_for_all() == [1, 1]
    line = run.output().splitlines()[-1]
    assert line.startswith("error: step 3: loss is nan on rank 1, samples 4 to 5 of batch 2, from train: epoch 0, ")
    assert line.endswith(
        f"on ({run_dir}/spikes.jsonl has them all); the state before the step is saved: lower the learning rate, or "
        f"pass over the batch by --data.skip 2, both with --resume; or set train.on_non_finite skip."
    )
    assert line in run.output(rank=1)
    assert newest_checkpoint(run_dir)[0] == run_dir / "checkpoints" / "step-000002"
    (spike,) = read_records(run_dir, name="spikes.jsonl")
    assert (spike["step"], spike["batch"], spike["loss"], spike["reason"]) == (3, 2, None, "loss is nan")
    assert [(suspect["rank"], suspect["places"]) for suspect in spike["suspects"]] == [(1, [4, 5]), (1, [6, 7])]
    assert [len(suspect["samples"]) for suspect in spike["suspects"]] == [2, 2]


def test_a_step_that_is_not_finite_is_skipped_on_both_ranks_where_that_is_asked_for(runs, write_recipe, tmp_path):
    command, run_dir = write_recipe(tmp_path, train={"on_non_finite": "skip"})
    run = runs.start(*command, patch="run_patches:poison_rank_one", num_processes=2)
    codes = run.wait_for_all()
    # rank 1 goes on failing from its third step on, so the limit is reached after five
    assert codes == [1, 1]
    assert "step 8: loss is nan, after 5 such steps in a row (train.max_skipped_steps) on rank 1" in run.output()
    records = [record for record in read_records(run_dir) if "train/loss" in record]
    assert [record["train/loss"] is None for record in records] == [False] * 2 + [True] * 5
    assert [record.get("train/skipped_steps") for record in records] == [None, None, 1, 2, 3, 4, 5]


def test_a_rank_without_a_token_to_predict_neither_hangs_nor_counts(runs, write_recipe, tmp_path):
    """Fault 19."""
    command, run_dir = write_recipe(tmp_path, train={"max_steps": 4})
    run = runs.start(*command, patch="run_patches:mask_rank_one", num_processes=2)
    assert run.wait_for_all() == [0, 0], run.output()
    losses = [record["train/loss"] for record in read_records(run_dir) if "train/loss" in record]
    assert all(4 < loss < 6 for loss in losses)
