"""What takes minutes: the quickstart itself, and a run that is killed again and again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "pretrain.py"
WORDS = ["def", "return", "(", ")", ":", "\n", "self", "value", "=", "1", "naïve", "if"]

# Run by every interpreter of this environment before anything else: no connection leaves this machine.
NO_NETWORK = """
import socket
_connect = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and not str(address[0]).startswith(("127.", "localhost", "::1")):
        raise SystemExit(f"the quickstart connects to {address}")
    return _connect(self, address)
socket.socket.connect = connect
"""


@pytest.mark.trial
def test_the_quickstart_trains_a_model_from_nothing_in_a_minute_and_without_network(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "OMP_"))}
    environment |= {"PYTHONPATH": f"{tmp_path}/site:{ROOT}", "HF_HOME": f"{tmp_path}/hf", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command = [*launcher, SCRIPT, "--train.max_time_s=60"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert finished.returncode == 0, finished.stderr
    stats = json.loads((tmp_path / "runs" / "quickstart" / "stats.json").read_text())
    assert stats["elapsed_s"] <= 60 * 1.05
    assert stats["val/bits_per_byte"] < 3.0
    assert (tmp_path / "runs" / "quickstart" / "final" / "config.json").is_file()


def write_recipe(directory, *, shards):
    """A run of 400 steps that saves every five, on a corpus of a few kilobytes."""
    directory.mkdir()
    recipe = {
        "run": {"dir": str(directory / "runs")},
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "hidden_dropout": 0.1,
        },
        "data": {"preparation": shards, "sequence_length": 16},
        "train": {
            "max_steps": 400,
            "tokens_per_step": 128,
            "micro_batch_size": 4,
            "mixed_precision": "no",
            "num_threads": 1,
            "save_steps": 5,
        },
        "optimizer": {"name": "muon", "warmup_steps": 10},
        "evaluation": {"eval_steps": 20, "sample_steps": 50, "num_validation_prompts": 1, "max_new_tokens": 4},
    }
    (directory / "tiny.yaml").write_text(json.dumps(recipe))
    return [sys.executable, str(SCRIPT), "--config", str(directory / "tiny.yaml")]


def records(directory, name):
    lines = [json.loads(line) for line in (directory / "runs" / "tiny" / name).read_text().splitlines()]
    clock = ("elapsed_s", "tokens_per_s", "data/waited_s")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


@pytest.mark.trial
def test_a_run_killed_ten_times_ends_as_one_that_was_never_killed(tmp_path):
    (tmp_path / "texts").mkdir()
    generator = random.Random(0)
    for number in range(30):
        text = " ".join(generator.choices(WORDS, k=generator.randint(40, 400)))
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    shards = {
        "output_dir": f"{tmp_path}/shards",
        "corpus": {"kind": "files", "paths": [f"{tmp_path}/texts/*.txt"], "validation_fraction": 0.2},
        "tokenizer": {"path": f"{tmp_path}/tokenizer", "vocab_size": 280},
    }
    killed, straight = (write_recipe(tmp_path / name, shards=shards) for name in ("killed", "straight"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    whole = subprocess.run(straight, **options)
    assert whole.returncode == 0, whole.stderr

    moments = random.Random(time.time_ns())
    metrics = tmp_path / "killed" / "runs" / "tiny" / "metrics.jsonl"
    for _ in range(10):
        size = metrics.stat().st_size if metrics.exists() else 0
        process = subprocess.Popen(
            killed, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # from the moment the run records something new, at most a second on
        while process.poll() is None and (metrics.stat().st_size if metrics.exists() else 0) <= size:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = subprocess.run(killed, **options)
    assert last.returncode == 0, last.stderr

    for file in ("model/model.safetensors", "state/optimizer.safetensors"):
        found, expected = (
            load_file(tmp_path / name / "runs" / "tiny" / "checkpoints" / "step-000400" / file)
            for name in ("killed", "straight")
        )
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in found)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert records(tmp_path / "killed", name) == records(tmp_path / "straight", name)
    assert [
        path.name for path in (tmp_path / "killed" / "runs" / "tiny" / "checkpoints").iterdir() if "tmp" in path.name
    ] == []
