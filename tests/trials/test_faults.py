"""The long faults: killed at every point and at random moments, many ranks, a launcher that is killed, a full disk, a
long run that must not grow."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "training"))

from forked_runs import files_of, free_port, read_records, read_tensors  # noqa: E402

from gpt2x.checkpoints.format import list_checkpoints, newest_checkpoint  # noqa: E402

pytestmark = pytest.mark.trial

SCRIPT = ROOT / "scripts" / "pretrain.py"
WORDS = ["def", "return", "(", ")", ":", "\n", "self", "value", "=", "1", "naïve", "if"]

# Every function between the decision to save and its end, and the others that write or compute, with calls early and
# late in the run: (module, function, numbers of calls).
POINTS = [
    ("gpt2x.checkpoints.saver", "HostCopies.take", (1, 2)),
    ("gpt2x.checkpoints.saver", "write_checkpoint", (1, 2, 3)),
    ("gpt2x.training.trainee", "save_model", (1, 2)),
    ("gpt2x.models", "write_tokenizer", (1, 2)),
    ("safetensors.torch", "save_file", (1, 2)),
    ("gpt2x.checkpoints.format", "write_manifest", (1, 2, 3)),
    ("gpt2x.manifest", "sha256_of", (1, 5, 12, 20)),
    ("gpt2x.files", "_settle", (1, 2, 3, 4)),
    ("gpt2x.files", "sync", (1, 5, 12, 20, 30, 40)),
    ("gpt2x.checkpoints.retention", "remove_checkpoints", (1, 2, 3)),
    ("gpt2x.files", "shutil.rmtree", (1,)),
    ("gpt2x.training.steps", "count_targets", (1, 2, 13, 14)),
    ("gpt2x.training.loop", "optimizer_step", (1, 7, 12)),
    ("gpt2x.runs.directory", "append_line", (1, 8, 13)),
    ("gpt2x.evaluation.validation", "_batch_sums", (1, 3)),
    ("gpt2x.runs.directory", "write_file", (1,)),
    ("gpt2x.training.finish", "write_final", (1,)),
    ("gpt2x.training.finish", "write_losses", (1,)),
    ("gpt2x.training.finish", "write_stats", (1,)),
]


@pytest.fixture(scope="module")
def shards_dir(tmp_path_factory):
    """A few kilobytes of text as token shards."""
    root, generator = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for number in range(30):
        (root / f"{number}.txt").write_text(" ".join(generator.choices(WORDS, k=generator.randint(40, 400))))
    recipe = {
        "output_dir": f"{root}/shards",
        "corpus": {"kind": "files", "paths": [f"{root}/*.txt"], "validation_fraction": 0.2},
        "tokenizer": {"path": f"{root}/tokenizer", "vocab_size": 280},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "prepare_data.py", "--config", root / "recipe.yaml"], check=True
    )
    return root / "shards"


@pytest.fixture(scope="module")
def write_recipe(shards_dir):
    """Writes tiny.yaml: 12 steps with dropout, saved every four, validated and sampled every six."""

    def write(directory, *, evaluation=None, **train):
        directory.mkdir(parents=True, exist_ok=True)
        steps = {"max_steps": 12, "save_steps": 4, "save_total_limit": 1, "num_threads": 1}
        recipe = {
            "run": {"dir": f"{directory}/runs"},
            "model": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 32,
                "hidden_dropout": 0.1,
            },
            "data": {"path": str(shards_dir), "sequence_length": 16},
            "train": steps | {"tokens_per_step": 128, "micro_batch_size": 4, "mixed_precision": "no"} | train,
            "optimizer": {"name": "muon", "warmup_steps": 4},
            "evaluation": {"eval_steps": 6, "sample_steps": 6, "num_validation_prompts": 1, "max_new_tokens": 4}
            | (evaluation or {}),
        }
        (directory / "tiny.yaml").write_text(yaml.safe_dump(recipe))
        return ("--config", directory / "tiny.yaml"), directory / "runs" / "tiny"

    return write


@pytest.fixture(scope="module")
def straight(runs, write_recipe, tmp_path_factory):
    """The run that nothing has happened to."""
    command, run_dir = write_recipe(tmp_path_factory.mktemp("straight"))
    code, output = runs.run(*command)
    assert code == 0, output
    return run_dir


def assert_alike(run_dir, straight):
    # A kill after the run's last file leaves its lock, which keeps nobody out.
    assert files_of(run_dir) - {"run.lock", "run.lease"} == files_of(straight)
    found, expected = (read_tensors(path / "checkpoints" / "step-000012") for path in (run_dir, straight))
    assert found.keys() == expected.keys()
    assert [name for name in found if not found[name].equal(expected[name])] == []
    assert read_records(run_dir) == read_records(straight)
    assert (run_dir / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


@pytest.mark.parametrize(("module", "function", "calls"), POINTS, ids=lambda value: str(value))
def test_killed_before_or_after_every_named_call_it_ends_alike(
    runs, write_recipe, straight, tmp_path, module, function, calls
):
    """Faults 1 and 2."""
    for call in calls:
        is_end = (module, function) == ("gpt2x.training.finish", "write_stats")  # after it the run is finished
        for when in ("before",) if is_end else ("before", "after"):
            command, run_dir = write_recipe(tmp_path / f"{when}-{call}")
            code, output = runs.run(*command, at=f"{module}:{function}:{when}:{call}:SIGKILL")
            assert code == -signal.SIGKILL, f"{when} call {call} never came: {output}"
            code, output = runs.run(*command)
            assert code == 0, output
            assert_alike(run_dir, straight)


def test_killed_thirty_times_at_random_it_ends_alike(runs, write_recipe, straight, tmp_path):
    """Fault 1: within the seconds in which it makes its checkpoints, which are whole whenever one looks."""
    command, run_dir = write_recipe(tmp_path)
    moments, resumed_at = random.Random(time.time_ns()), []
    for _ in range(30):
        run = runs.start(*command)
        time.sleep(moments.uniform(0.1, 1.0))
        with contextlib.suppress(ProcessLookupError):  # where it has finished
            run.send(signal.SIGKILL)
        run.wait()
        checkpoint, passed_over = newest_checkpoint(run_dir)
        assert passed_over == []
        resumed_at.append(0 if checkpoint is None else int(checkpoint.name[5:]))
        if (run_dir / "stats.json").exists():
            assert_alike(run_dir, straight)
            subprocess.run(["rm", "-r", run_dir], check=True)
    print(f"newest checkpoints found: {resumed_at}")
    assert runs.run(*command)[0] == 0
    assert_alike(run_dir, straight)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_other_numbers_of_processes_read_the_same_samples_to_the_same_losses(runs, write_recipe, tmp_path, optimizer):
    """Fault 16: 4 -> 2 -> 1 and 1 -> 4, against one process all along; 3 does not divide the batch."""
    no_dropout = ("--model.hidden_dropout=0", "--train.micro_batch_size=2", "--resume=true")
    no_dropout += (f"--optimizer.name={optimizer}",)
    logs = {}
    for name, worlds in {"one": (1, 1, 1), "shrinking": (4, 2, 1), "growing": (1, 1, 4)}.items():
        command, run_dir = write_recipe(tmp_path / name)
        for max_steps, num_processes in zip((4, 8, 12), worlds, strict=True):
            arguments = (*command, *no_dropout, f"--train.max_steps={max_steps}", "--optimizer.warmup_steps=0")
            run = runs.start(*arguments, "--optimizer.lr_scheduler_type=wsd", "--optimizer.decay_ratio=0",
                             num_processes=num_processes)  # fmt: skip
            assert run.wait_for_all() == [0] * num_processes, run.output()
        logs[name] = [record for record in read_records(run_dir) if "train/loss" in record]
    for name in ("shrinking", "growing"):
        assert [r["data/checksum"] for r in logs[name]] == [r["data/checksum"] for r in logs["one"]]
        assert [r["train/loss"] for r in logs[name]] == pytest.approx([r["train/loss"] for r in logs["one"]], abs=1e-5)
    run = runs.start(*arguments, "--train.max_steps=13", num_processes=3)
    time.sleep(3)
    for rank in (1, 2):
        run.send(signal.SIGKILL, rank=rank)  # as a launcher would when rank 0 has left
    run.wait_for_all()
    assert "must be a multiple of micro_batch_size x sequence_length x data-parallel processes = 2 x 16 x 3 = 96" in (
        run.output()
    )


def test_a_full_disk_keeps_the_older_checkpoint_and_says_how_much_is_missing(runs, write_recipe, straight, tmp_path):
    """Fault 6 on a real file system of 4 MB that another program fills."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        command, run_dir = write_recipe(disk)
        code, output = runs.run(*command, patch="run_patches:fill_the_disk")
        assert code == 1
        line = output.splitlines()[-1]
        assert "No space left on device" in line
        assert "older checkpoints are kept. Make room, and the same command goes on from the newest." in line
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000004"]
        (disk / "filler").unlink()
        assert runs.run(*command)[0] == 0
        assert_alike(run_dir, straight)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- launchers -------------------------------------------------------------------------------------------------------


def launch(command, num_processes, home):
    config = "cpu_2_processes.yaml" if num_processes == 2 else "cpu.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", f"--main_process_port={free_port()}"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / config), str(SCRIPT), *map(str, command)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        launcher,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment | {"PYTHONPATH": str(ROOT), "HF_HOME": str(home)},
    )


def processes_of(file):
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(file).encode() in command.read_bytes():
                found.append(int(command.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C", "lost terminal", "SIGKILL"])
def test_what_ends_the_launcher_saves_the_run_and_leaves_no_orphan(write_recipe, tmp_path, num_processes, how):
    """Fault 3. Ctrl-C of a terminal and its end reach the launcher's whole group; SIGKILL nobody but the launcher."""
    command, run_dir = write_recipe(tmp_path, max_steps=100_000, save_steps=None)
    process = launch(command, num_processes, tmp_path)
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:  # all have finished a step then
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if how in ("Ctrl-C", "lost terminal"):
        os.killpg(process.pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGHUP)
    else:
        process.send_signal(signal.Signals[how])
    output, _ = process.communicate(timeout=60)
    while processes_of(tmp_path / "tiny.yaml"):
        assert time.monotonic() < deadline, output
        time.sleep(0.05)
    (checkpoint,) = list_checkpoints(run_dir)
    assert newest_checkpoint(run_dir) == (checkpoint, [])
    steps = [record["step"] for record in read_records(run_dir) if "train/loss" in record]
    assert steps[-1] == int(checkpoint.name[5:])
    assert not (run_dir / "run.lock").exists()


# --- a long run ------------------------------------------------------------------------------------------------------

SOAK = """
import json, os, runpy, sys
from pathlib import Path
from gpt2x.checkpoints.progress import Progress
found, advance = {}, Progress.advance
def usage():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "files": len(os.listdir("/proc/self/fd")), "children": children}
def watched(self, **arguments):
    advance(self, **arguments)
    if self.step in (200, 1999):
        found[self.step] = usage()
Progress.advance = watched
script, target = sys.argv[1], sys.argv[2]
sys.argv = [script, *sys.argv[3:]]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as left:
    Path(target).write_text(json.dumps({"code": left.code, **found}))
"""


def test_two_thousand_steps_leave_memory_and_files_as_they_were(write_recipe, tmp_path):
    command, _ = write_recipe(
        tmp_path, max_steps=2000, save_steps=25, save_total_limit=2, evaluation={"eval_steps": 25, "sample_steps": 50}
    )
    arguments = [sys.executable, "-c", SOAK, SCRIPT, tmp_path / "found.json", *command]
    subprocess.run(arguments, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    early, late = found["200"], found["1999"]
    print(f"resident {early['rss']:,} bytes after step 200, {late['rss']:,} at the end")
    assert found["code"] == 0
    assert late["rss"] == pytest.approx(early["rss"], rel=0.02)
    assert (late["files"], late["children"]) == (early["files"], [])
    assert processes_of(tmp_path / "tiny.yaml") == []
