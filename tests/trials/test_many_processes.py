"""The same run on other devices: hybrid shards, compiled shards, two launchers, and a run that moves between them."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_runs import ROOT, SCRIPT, WORDS, write_recipe

from gpt2x.checkpoints.format import list_checkpoints
from gpt2x.runs.layout import step_of

FOUR = ("hsdp.yaml", "--num_processes=4", "--parallelism_config_dp_shard_size=2")
CUT = ("fsdp2_tp.yaml", "--num_processes=4", "--parallelism_config_dp_shard_size=2")
TWO = ("fsdp2.yaml", "--num_processes=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The recipe of a run of 20 steps that saves every five, and its data."""
    directory = tmp_path_factory.mktemp("many")
    texts = directory / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number:03d}.txt").write_text(" ".join(WORDS[(number * k * k) % 12] for k in range(40, 300)))
    shards = {
        "output_dir": str(directory / "shards"),
        "corpus": {"kind": "files", "paths": [f"{texts}/*.txt"], "validation_fraction": 0.2},
        "tokenizer": {"path": str(directory / "tokenizer"), "vocab_size": 280},
    }
    write_recipe(directory / "recipe", shards=shards)
    recipe = json.loads((directory / "recipe" / "tiny.yaml").read_text())
    recipe["model"]["hidden_dropout"] = 0.0  # random numbers are a rank's own
    recipe["train"] |= {"max_steps": 20, "micro_batch_size": 2}
    recipe["optimizer"]["name"] = "adamw"
    recipe["evaluation"] |= {"eval_steps": 10, "sample_steps": None}
    (directory / "tiny.yaml").write_text(json.dumps(recipe))
    return directory / "tiny.yaml"


def command(base, runs_dir, *, config=None, port=None, options=()):
    """scripts/pretrain.py on the recipe, under a launch configuration or on its own."""
    script = [str(SCRIPT), "--config", str(base), "--run.dir", str(runs_dir)]
    if config is None:
        return [sys.executable, *script, *options]
    file, *overrides = config
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", f"--main_process_port={port}"]
    return [*launcher, "--config_file", str(ROOT / "accelerate_configs" / file), *overrides, *script, *options]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def run(base, runs_dir, *, config=None, options=()):
    whole = command(base, runs_dir, config=config, port=free_port(), options=options)
    finished = subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return runs_dir / "tiny"


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: (line["train/loss"], line["data/checksum"]) for line in lines if "train/loss" in line}
    assert sorted(steps) == list(range(1, 21))
    return [steps[step][0] for step in sorted(steps)], [steps[step][1] for step in sorted(steps)]


def cut_back(run_dir: Path, step: int) -> None:
    """Leaves a finished run as it was when it had made the checkpoint of a step."""
    for checkpoint in list_checkpoints(run_dir):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    (run_dir / "stats.json").unlink()
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(run_dir)][-1] == step


@pytest.fixture(scope="module")
def one(base, tmp_path_factory):
    """The directory of the run that one process made."""
    return run(base, tmp_path_factory.mktemp("one"), options=["--train.save_total_limit=9"])


def assert_same_run(found, expected):
    (found_losses, found_samples), (expected_losses, expected_samples) = losses(found), losses(expected)
    assert found_samples == expected_samples
    assert found_losses == pytest.approx(expected_losses, rel=1e-5)
    files = [next((directory / "final").glob("*.safetensors")) for directory in (found, expected)]
    weights, expected_weights = (load_file(file) for file in files)
    for name, weight in expected_weights.items():
        assert (weights[name] - weight).norm() <= 1e-4 * weight.norm() + 1e-6, name


@pytest.mark.trial
def test_a_run_moves_from_one_process_to_four_to_two_and_back_to_one(base, one, tmp_path):
    shutil.copytree(one, tmp_path / "tiny")
    cut_back(tmp_path / "tiny", 5)
    options = ["--train.save_total_limit=9", "--resume=true"]
    run(base, tmp_path, config=FOUR, options=options)
    cut_back(tmp_path / "tiny", 10)
    run(base, tmp_path, config=TWO, options=options)
    cut_back(tmp_path / "tiny", 15)
    assert_same_run(run(base, tmp_path, options=options), one)


@pytest.mark.trial
def test_matrices_cut_across_two_of_four_processes_train_as_on_one(base, one, tmp_path):
    shutil.copytree(one, tmp_path / "tiny")
    cut_back(tmp_path / "tiny", 10)
    options = ["--train.save_total_limit=9", "--resume=true"]
    run(base, tmp_path, config=CUT, options=options)
    cut_back(tmp_path / "tiny", 15)
    assert_same_run(run(base, tmp_path, options=options), one)


@pytest.mark.trial
def test_compiled_shards_train_as_one_process_does(base, one, tmp_path):
    assert_same_run(run(base, tmp_path, config=TWO, options=["--train.torch_compile=true"]), one)


@pytest.mark.trial
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_launchers_that_find_each_other_train_as_one_process_does(base, one, tmp_path, rendezvous):
    port, started = free_port(), []
    for rank in range(2):
        # by c10d ranks are agreed on, but accelerate wants rank 0 to find the port free: here both share one machine
        config = (f"ddp_two_machines_{rendezvous}.yaml", "--num_processes=2", f"--machine_rank={rank}")
        whole = command(base, tmp_path, config=config, port=port)
        started.append(subprocess.Popen(whole, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert_same_run(tmp_path / "tiny", one)
