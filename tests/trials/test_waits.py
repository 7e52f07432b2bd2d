"""Signals in every phase that waits, to a rank and to the launcher: the whole tree of processes is gone within 30 s,
what was trained is saved, and the same command goes on. Real processes, real launchers, servers that fall silent."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "training"))

from forked_runs import free_port, read_records  # noqa: E402

from gpt2x.checkpoints.format import newest_checkpoint  # noqa: E402
from gpt2x.files import locked  # noqa: E402

pytestmark = pytest.mark.trial

WORDS = ["def", "return", "(", ")", ":", "\n", "self", "value", "=", "1", "naïve", "if"]
GONE_S = 30


# --- processes -------------------------------------------------------------------------------------------------------


class Tree:
    """A command and every process that comes of it, known by what they inherit."""

    def __init__(self, directory, command, *, num_processes, has_launcher, script="pretrain.py", **environment):
        self.mark = f"GPT2X_TRIAL={directory}"
        self.output_file = directory / "output.txt"
        whole = [sys.executable, str(ROOT / "scripts" / script), *map(str, command)]
        if has_launcher:
            config = "cpu_2_processes.yaml" if num_processes == 2 else "cpu.yaml"
            options = [f"--main_process_port={free_port()}", "--config_file", ROOT / "accelerate_configs" / config]
            whole[1:1] = ["-m", "accelerate.commands.launch", "--quiet", *map(str, options)]
        known = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        known |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GPT2X_TRIAL": str(directory)}
        with self.output_file.open("w") as output:
            self.process = subprocess.Popen(
                whole, stdout=output, stderr=output, start_new_session=True, env=known | environment
            )

    def find(self, *, command="", environment=""):
        """The processes of the tree whose command line and environment hold these."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                held = (place / "environ").read_bytes().split(b"\0")
                line = (place / "cmdline").read_bytes().replace(b"\0", b" ")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            is_wanted = command.encode() in line and (not environment or environment.encode() in held)
            if line and self.mark.encode() in held and is_wanted:
                found.append(int(place.name))
        return sorted(found)

    def rank(self, number):
        """The process of a rank under the launcher of two."""
        (found,) = (
            pid
            for pid in self.find(command="pretrain.py", environment=f"RANK={number}")
            if b"accelerate.commands" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        return found

    def output(self):
        return self.output_file.read_text(errors="replace")

    def wait_until(self, condition, *, seconds=120):
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)

    def ends_by(self, number, pid):
        """Sends a signal and returns the exit code of the command, when every process of the tree is gone in time."""
        os.kill(pid, number)
        deadline = time.monotonic() + GONE_S
        while self.process.poll() is None or self.find():
            assert time.monotonic() < deadline, (self.find(), self.output())
            time.sleep(0.1)
        assert "once more" not in self.output().splitlines()[-1]
        return self.process.returncode

    def end(self):
        for pid in self.find():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    trees = []

    def start_one(*arguments, **options):
        trees.append(Tree(tmp_path, *arguments, **options))
        return trees[-1]

    yield start_one
    for tree in trees:
        tree.end()


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts, and token shards and a tokenizer of them."""
    root, generator = tmp_path_factory.mktemp("corpus"), random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(40, 400))) for _ in range(60)]
    for number, text in enumerate(texts):
        (root / f"{number}.txt").write_text(text)
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (root / "recipe.yaml").write_text(yaml.safe_dump(preparation_of(root, root / "shards")))
    script = ROOT / "scripts" / "prepare_data.py"
    subprocess.run([sys.executable, script, "--config", root / "recipe.yaml"], check=True)
    return root


def preparation_of(corpus, output_dir):
    return {
        "output_dir": str(output_dir),
        "corpus": {"kind": "files", "paths": [f"{corpus}/*.txt"], "validation_fraction": 0.2},
        "tokenizer": {"path": f"{corpus}/tokenizer", "vocab_size": 280},
    }


@pytest.fixture
def write_recipe(corpus, tmp_path):
    """Writes tiny.yaml; returns the script's arguments and the run's directory."""

    def write(*, data=None, hub=None, **train):
        steps = {"max_steps": 100_000, "save_steps": None, "num_threads": 1}
        sizes = {"tokens_per_step": 128, "micro_batch_size": 4, "mixed_precision": "no"}
        recipe = {
            "run": {"dir": f"{tmp_path}/runs"},
            "model": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 32,
            },
            "data": {"sequence_length": 16} | (data or {"path": str(corpus / "shards")}),
            "train": steps | sizes | train,
            "optimizer": {"warmup_steps": 4},
            "evaluation": {"eval_steps": None, "num_validation_prompts": 1, "max_new_tokens": 4},
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe | ({"hub": hub} if hub else {})))
        return ("--config", tmp_path / "tiny.yaml"), tmp_path / "runs" / "tiny"

    return write


def stream_of(corpus, tmp_path, file):
    return {
        "stream": {
            "corpus": {"kind": "dataset", "dataset": "json", "data_files": [str(file)], "validation_fraction": 0.2},
            "tokenizer": f"{corpus}/tokenizer",
            "cache_dir": f"{tmp_path}/cache",
            "max_cached_shards": 4,
            "shards_per_era": 2,
            "tokens_per_shard": 2000,
        }
    }


class Silent(BaseHTTPRequestHandler):
    """Serves one file; once the server is silent, it takes requests and answers nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client that gave up is nothing to talk about
            super().handle()

    def do_GET(self):
        while self.server.is_silent:
            time.sleep(0.1)
        content, status = self.server.content, 200
        first, last = 0, len(content) - 1
        if requested := self.headers.get("Range"):
            first, last = (int(bound or last) for bound in requested.partition("=")[2].split("-"))
            status = 206
        self.send_response(status)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[first : last + 1])

    do_HEAD = do_POST = do_GET  # noqa: N815


@contextlib.contextmanager
def serving(content, *, is_silent=False):
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        server.daemon_threads = True
        server.content, server.is_silent = content, is_silent
        server.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.is_silent = False
        server.shutdown()


def steps_of(run_dir):
    if not (run_dir / "metrics.jsonl").exists():
        return []
    return [record["step"] for record in read_records(run_dir) if "train/loss" in record]


def wait_until_it_waits(tree, run_dir):
    """Until no step has come for three seconds."""
    seen, since = None, time.monotonic()

    def is_waiting():
        nonlocal seen, since
        if (now := steps_of(run_dir)[-1:]) != seen:
            seen, since = now, time.monotonic()
        return bool(seen) and time.monotonic() > since + 3

    tree.wait_until(is_waiting)


def assert_saved_and_goes_on(runs, command, run_dir, *, num_processes):
    """The last step that was recorded is saved, and the same command, with two steps more, ends well."""
    checkpoint, passed_over = newest_checkpoint(run_dir)
    step = int(checkpoint.name[5:])
    assert (steps_of(run_dir)[-1], passed_over) == (step, [])
    run = runs.start(*command, f"--train.max_steps={step + 2}", "--resume=true", num_processes=num_processes)
    assert run.wait_for_all() == [0] * num_processes, run.output()
    assert f"resumed at step {step:,}" in run.output()
    assert steps_of(run_dir) == list(range(1, step + 3))


def assert_code(tree, code, *, target, expected=143):
    """The exit code of the process that got the signal, as far as what started it lets it through."""
    if target == "alone":
        assert code == expected, tree.output()
    elif target in ("rank 0", "rank 1"):
        assert re.search(rf"exitcode\s*: {expected} ", tree.output()), tree.output()


def pid_of(tree, target):
    """The process that gets the signal: the launcher, or a rank of two, or the run without a launcher."""
    return tree.rank(int(target[-1])) if target.startswith("rank") else tree.process.pid


TARGETS = {"alone": (1, False), "launcher of 1": (1, True), "launcher of 2": (2, True), "rank 1": (2, True)}


# --- the phases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["alone", "launcher of 2", "rank 1"])
def test_while_a_stream_is_down(start, runs, corpus, write_recipe, tmp_path, target):
    num_processes, has_launcher = TARGETS[target]
    with serving((corpus / "rows.jsonl").read_bytes()) as server:
        command, run_dir = write_recipe(data=stream_of(corpus, tmp_path, f"{server.address}/rows.jsonl"))
        tree = start(command, num_processes=num_processes, has_launcher=has_launcher)
        tree.wait_until(lambda: steps_of(run_dir))
        server.is_silent = True
        wait_until_it_waits(tree, run_dir)
        assert_code(tree, tree.ends_by(signal.SIGTERM, pid_of(tree, target)), target=target)
        server.is_silent = False
        assert "stopped at step" in tree.output()
        assert_saved_and_goes_on(runs, command, run_dir, num_processes=num_processes)


def test_while_a_filler_hangs(start, runs, corpus, write_recipe, tmp_path):
    """And the terminal is lost."""
    command, run_dir = write_recipe(data=stream_of(corpus, tmp_path, corpus / "rows.jsonl"))
    tree = start(command, num_processes=1, has_launcher=False)
    tree.wait_until(lambda: steps_of(run_dir))
    (filler,) = tree.find(command="gpt2x.streams")
    os.kill(filler, signal.SIGSTOP)
    wait_until_it_waits(tree, run_dir)
    assert_code(tree, tree.ends_by(signal.SIGHUP, tree.process.pid), target="alone", expected=129)
    assert_saved_and_goes_on(runs, command, run_dir, num_processes=1)


@pytest.mark.parametrize("target", TARGETS)
def test_while_another_rank_prepares(start, runs, corpus, write_recipe, tmp_path, target):
    num_processes, has_launcher = TARGETS[target]
    shards = tmp_path / "prepared"
    shards.mkdir()
    data = {"path": None, "preparation": preparation_of(corpus, shards)}
    command, run_dir = write_recipe(data=data, max_steps=2)
    with locked(shards / "preparation.lock"):
        tree = start(command, num_processes=num_processes, has_launcher=has_launcher)
        tree.wait_until(lambda: "waiting for process" in tree.output())
        time.sleep(5)  # until the others wait
        assert_code(tree, tree.ends_by(signal.SIGTERM, pid_of(tree, target)), target=target)
    assert "SIGTERM: nothing to save, leaving." in tree.output()
    run = runs.start(*command, num_processes=num_processes)
    assert run.wait_for_all() == [0] * num_processes, run.output()
    assert steps_of(run_dir) == [1, 2]


@pytest.mark.parametrize("target", ["alone", "launcher of 2"])
def test_while_the_first_step_is_compiled(start, write_recipe, tmp_path, target):
    num_processes, has_launcher = TARGETS[target]
    command, run_dir = write_recipe(torch_compile=True, max_steps=2)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    tree = start(command, num_processes=num_processes, has_launcher=has_launcher, **cache)
    tree.wait_until(lambda: tree.find(command="cc1plus"))
    assert_code(tree, tree.ends_by(signal.SIGTERM, pid_of(tree, target)), target=target)
    assert "SIGTERM: nothing to save, leaving." in tree.output()
    assert steps_of(run_dir) == []


@pytest.mark.parametrize("target", ["alone", "launcher of 1", "launcher of 2"])
def test_while_it_is_pushed_to_a_hub_that_is_silent(start, runs, write_recipe, target):
    num_processes, has_launcher = TARGETS[target]
    command, _ = write_recipe(max_steps=2, hub={"push": True, "repo_id": "user/tiny"})
    with serving(b"", is_silent=True) as hub:
        online = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_abc", "HF_HUB_OFFLINE": "0"}
        tree = start(command, num_processes=num_processes, has_launcher=has_launcher, **online)
        tree.wait_until(lambda: tree.find(command="gpt2x.publishing.upload"))
        assert_code(tree, tree.ends_by(signal.SIGTERM, pid_of(tree, target)), target=target)
    assert "SIGTERM: nothing to save, leaving." in tree.output()
    code, output = runs.run(*command)
    assert (code, "is finished; its model is in" in output) == (0, True), output


SLOW = """
import os, runpy, sys, time
from pathlib import Path
from gpt2x.checkpoints import saver as saving
original = saving.write_checkpoint
def slow(target, **options):
    if target.name == "step-000004":
        Path(os.environ["GPT2X_TRIAL"], "saving").touch()
        time.sleep(6)
    original(target, **options)
saving.write_checkpoint = slow
sys.argv[0] = SCRIPT
runpy.run_path(SCRIPT, run_name="__main__")
"""


@pytest.mark.parametrize("target", ["launcher of 1", "launcher of 2", "rank 1"])
def test_while_the_last_checkpoint_is_saved(start, runs, write_recipe, tmp_path, target):
    num_processes, has_launcher = TARGETS[target]
    command, run_dir = write_recipe(max_steps=4)
    script = tmp_path / "slow_pretrain.py"
    script.write_text(f"SCRIPT = {str(ROOT / 'scripts' / 'pretrain.py')!r}\n{SLOW}")
    tree = start(command, num_processes=num_processes, has_launcher=has_launcher, script=script)
    tree.wait_until((tmp_path / "saving").exists)
    assert_code(tree, tree.ends_by(signal.SIGTERM, pid_of(tree, target)), target=target)
    assert "stopped at step 4; the same command goes on from there." in tree.output()
    assert int(newest_checkpoint(run_dir)[0].name[5:]) == 4
    run = runs.start(*command, num_processes=num_processes)
    assert run.wait_for_all() == [0] * num_processes, run.output()
    assert (run_dir / "stats.json").exists()


def test_one_rank_may_prepare_and_save_for_longer_than_the_group_waits(runs, write_recipe):
    """Three seconds of patience for a main process that needs five for its data and five for each checkpoint."""
    command, run_dir = write_recipe(max_steps=3, save_steps=1)
    run = runs.start(*command, patch="rank_patches:have_a_slow_main_process", num_processes=2)
    assert run.wait_for_all() == [0, 0], run.output() + run.output(rank=1)
    assert "waiting for the main process, which checks or prepares the data." in run.output(rank=1)
    assert steps_of(run_dir) == [1, 2, 3]


@pytest.mark.parametrize(
    ("where", "save_steps", "line"),
    [
        ("step", None, "Timed out waiting 3000ms"),
        ("save", 1, "another process of the run gives no sign of life for 3 s"),
    ],
)
def test_a_rank_that_hangs_ends_the_others_when_they_have_waited_long_enough(
    runs, write_recipe, where, save_steps, line
):
    """Rank 1 stands still before its sixth step, or its sixth save."""
    command, run_dir = write_recipe(save_steps=save_steps, save_total_limit=1)
    function = {"step": "gpt2x.training.loop:optimizer_step", "save": "gpt2x.training.trainer:Trainer.reserve_copies"}[
        where
    ]
    patch, at = "rank_patches:have_little_patience", f"{function}:before:6:SIGSTOP"
    run = runs.start(*command, patch=patch, at=at, at_rank=1, num_processes=2)
    run.wait_until(lambda: line in run.output())
    run.send(signal.SIGKILL, rank=1)  # as a launcher does
    assert run.wait_for_all() == [1, -signal.SIGKILL]
    if where == "step":
        return
    step = int(newest_checkpoint(run_dir)[0].name[5:])
    run = runs.start(*command, f"--train.max_steps={step + 2}", "--resume=true", num_processes=2)
    assert run.wait_for_all() == [0, 0], run.output()
    assert steps_of(run_dir) == list(range(1, step + 3))
