"""scripts/pretrain.py as people run it: its exit codes, its last lines, Ctrl-C."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from gpt2x.command_line import parse_recipe
from gpt2x.commands import shell_command
from gpt2x.config import Recipe
from gpt2x.run import run as run_recipe
from gpt2x.training.signals import StopRequest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "pretrain.py"
WORDS = ["def", "return", "(", ")", ":", "\n", "self", "value", "=", "1", "naïve", "if"]
SECONDS = 5
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes=1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The `data` section of a recipe: a few kilobytes of text, prepared by the first run that wants them."""
    root = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    for number in range(30):
        (root / f"{number}.txt").write_text(" ".join(generator.choices(WORDS, k=generator.randint(40, 400))))
    preparation = {
        "output_dir": f"{root}/shards",
        "corpus": {"kind": "files", "paths": [f"{root}/*.txt"], "validation_fraction": 0.2},
        "tokenizer": {"path": f"{root}/tokenizer", "vocab_size": 280},
        "tokens_per_shard": 100_000,
    }
    return {"preparation": preparation, "sequence_length": 16}


@pytest.fixture(scope="module")
def write_recipe(corpus):
    """Writes tiny.yaml in a directory, with the runs in it too, and returns its path."""

    def write(directory, *, data=None, **train):
        steps = {"max_steps": 4, "tokens_per_step": 128, "micro_batch_size": 8, "mixed_precision": "no"}
        recipe = {
            "run": {"dir": f"{directory}/runs"},
            "model": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 32,
            },
            "data": data or corpus,
            "train": steps | train,
            "evaluation": {"eval_steps": None, "num_validation_prompts": 1, "max_new_tokens": 4},
        }
        (directory / "tiny.yaml").write_text(yaml.safe_dump(recipe))
        return directory / "tiny.yaml"

    return write


def environment(**changes):
    """This environment without what launchers and this test's own settings put into it."""
    unwanted = ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {key: value for key, value in os.environ.items() if key not in unwanted} | {"PYTHONPATH": path} | changes


def run(*arguments, launcher=(), cwd=ROOT):
    command = [sys.executable, *launcher, str(SCRIPT), *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), timeout=120)


def launch(*arguments, home):
    """accelerate launch without a config file, as on a machine where nobody has made one."""
    launcher = ("-m", "accelerate.commands.launch", "--quiet", "--num_processes=1")
    command = [sys.executable, *launcher, str(SCRIPT), *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(HF_HOME=str(home)), timeout=120
    )


@pytest.fixture(scope="module")
def launched(write_recipe, tmp_path_factory):
    """(recipe file, what `accelerate launch scripts/pretrain.py` printed)."""
    directory = tmp_path_factory.mktemp("launched")
    recipe_file = write_recipe(directory)
    return recipe_file, launch("--config", recipe_file, home=directory)


def test_one_command_prepares_the_data_trains_and_says_what_to_do_with_the_model(launched):
    recipe_file, finished = launched
    assert finished.returncode == 0, finished.stderr
    final = recipe_file.parent / "runs" / "tiny" / "final"
    lines = finished.stdout.splitlines()[-3:]
    bits = json.loads((final.parent / "stats.json").read_text())["val/bits_per_byte"]
    assert lines == [
        f"model:          {final}",
        f"bits per byte:  {bits:.4f} on the held-out documents",
        f"sample from it: {shell_command('generate', final)}",
    ]
    assert (final / "model.safetensors").is_file()


def test_under_accelerate_launch_all_usable_cores_compute(launched):
    """The launcher sets OMP_NUM_THREADS=1 on a machine without a GPU."""
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    cores = len(os.sched_getaffinity(0))
    assert f"devices:   1 x cpu with {cores} threads, mixed precision no" in launched[1].stdout.splitlines()


def test_the_plan_is_told_before_the_first_step(launched):
    lines = launched[1].stdout.splitlines()
    assert [line.split(":")[0] for line in lines if ":" in line][:8] == [
        "run",
        "model",
        "data",
        "step",
        "budget",
        "compute",
        "optimizer",
        "devices",
    ]
    assert "step:      128 tokens = 8 sequences x 16 tokens x 1 processes x 1 accumulation steps" in lines


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state per process, torch the number of threads; no test leaves them to the next."""
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(threads)


def call_main(recipe_file, *arguments):
    """What the script does with a recipe, in this process."""
    recipe, _ = parse_recipe(Recipe, ["--config", str(recipe_file), *arguments], script="pretrain.py")
    return run_recipe(recipe, "tiny", stop=StopRequest(), environment={})


def test_the_same_command_says_that_the_run_is_finished_and_how_to_start_another(launched, capsys):
    before = (launched[0].parent / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    assert call_main(launched[0]) == 0
    path = launched[0].parent / "runs" / "tiny"
    line = f"{path} is finished; its model is in {path}/final. Start another with --run.name NAME.\n"
    assert capsys.readouterr().out == line
    assert (path / "metrics.jsonl").read_bytes() == before


# --- stopping --------------------------------------------------------------------------------------------------------


def wait_until(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.trial
def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_bytes(write_recipe, tmp_path):
    for name in ("stopped", "straight"):
        (tmp_path / name).mkdir()
    settings = {"max_steps": 300, "num_threads": 1}
    stopped, straight = (write_recipe(tmp_path / name, **settings) for name in ("stopped", "straight"))
    run_dir = stopped.parent / "runs" / "tiny"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--config", stopped],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    wait_until(lambda: (run_dir / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "SIGINT: saving after this step; once more to leave at once." in errors
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert 0 < step < 300
    assert output.splitlines()[-1] == f"stopped at step {step}; the same command goes on from there."

    resumed = run("--config", stopped)
    assert resumed.returncode == 0, resumed.stderr
    assert f"run:       {run_dir}, resumed at step {step}" in resumed.stdout.splitlines()
    assert call_main(straight) == 0
    for file in ("model/model.safetensors", "state/optimizer.safetensors"):
        found, expected = (
            load_file(path.parent / "runs" / "tiny" / "checkpoints" / "step-000300" / file)
            for path in (stopped, straight)
        )
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in found)
    losses = [np.load(path.parent / "runs" / "tiny" / "losses.npy") for path in (stopped, straight)]
    assert losses[0].shape == (300,)
    assert (losses[0] == losses[1]).all()


def read_until(stream, text):
    """Reads what a process writes, without waiting for a line's end, until a text has come."""
    seen = ""
    while text not in seen:
        piece = os.read(stream.fileno(), 4096).decode()
        assert piece, f"{text!r} never came: {seen}"
        seen += piece


@pytest.mark.trial
def test_ctrl_c_in_the_first_step_leaves_at_once_since_nothing_is_to_be_saved(write_recipe, tmp_path):
    """In the middle of a step that takes long."""
    recipe_file = write_recipe(tmp_path, tokens_per_step=16 * 400, micro_batch_size=1, num_threads=1)
    larger = ["--model.hidden_size=256", "--model.num_hidden_layers=6"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--config", recipe_file, *larger],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment(),
    )
    read_until(process.stderr, "0/4 step")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"SIGINT: nothing to save, leaving." in errors
    assert b"Traceback" not in errors
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()
    assert list((tmp_path / "runs" / "tiny" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("delay_s", [0.3, 1.5])
def test_ctrl_c_while_everything_is_imported_leaves_in_one_line(write_recipe, shards, tmp_path, delay_s):
    recipe_file = write_recipe(tmp_path, data={"path": str(shards), "sequence_length": 16})
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--config", recipe_file],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "\nSIGINT: nothing to save, leaving.\n")


def processes_of(recipe_file):
    """Process ids of this machine whose command line names a file."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(recipe_file).encode() in command.read_bytes():
                found.append(int(command.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_sigterm_to_the_launcher_itself_saves_and_leaves_no_orphan(write_recipe, shards, tmp_path):
    """accelerate launch of one process dies of SIGTERM without handing it on."""
    data = {"path": str(shards), "sequence_length": 16}
    recipe_file = write_recipe(tmp_path, data=data, max_steps=100_000, num_threads=1)
    run_dir = tmp_path / "runs" / "tiny"
    process = subprocess.Popen(
        [*LAUNCHER, SCRIPT, "--config", recipe_file],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment(HF_HOME=str(tmp_path)),
    )
    wait_until(lambda: (run_dir / "metrics.jsonl").exists(), process)
    (child,) = set(processes_of(recipe_file)) - {process.pid}
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    deadline = time.monotonic() + 60
    while processes_of(recipe_file):
        assert time.monotonic() < deadline, child
        time.sleep(0.05)
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert (checkpoint / "manifest.json").is_file()
    assert not (run_dir / "run.lock").exists()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(corpus, launched):
    """The shards that the launched run prepared."""
    assert launched[1].returncode == 0, launched[1].stderr
    return Path(corpus["preparation"]["output_dir"])


def wrong_id(shards, tmp_path):
    """Shards with one id that the vocabulary does not have, as a preparation gone wrong might have written them."""
    from gpt2x.shards.files import open_shard, write_shard

    shutil.copytree(shards, tmp_path / "wrong")
    (file,) = (tmp_path / "wrong" / "train").glob("*.safetensors")
    shard = open_shard(file)
    tokens = shard.tokens.copy()
    tokens[7] = 60_000
    sha256 = write_shard(file, tokens=tokens, documents=shard.documents.copy(), metadata=shard.metadata)
    index_file = tmp_path / "wrong" / "index.json"
    index = json.loads(index_file.read_text())
    index["splits"]["train"][0]["sha256"] = sha256
    del index["sha256"]  # of the index itself, which earlier versions did not write
    index_file.write_text(json.dumps(index))
    return file


def preparation_of(text_file, shards, tmp_path):
    """The `data` section that prepares one file of text."""
    corpus = {"kind": "files", "paths": [str(text_file)]}
    preparation = {"output_dir": f"{tmp_path}/none", "corpus": corpus, "tokenizer": {"path": f"{shards}/tokenizer"}}
    return {"preparation": preparation, "sequence_length": 16}


def mistakes(shards, tmp_path):
    """Name -> (arguments, data section if it is another one, exit code, the line)."""
    data = ("--data.path", shards)
    empty, missing = tmp_path / "empty.txt", tmp_path / "missing.txt"
    empty.write_text("  \n")
    file = wrong_id(shards, tmp_path)
    return {
        "unknown key": (
            [*data, "--train.max_stepz=3"],
            None,
            2,
            "pretrain.py: error: train.max_stepz is no field; did you mean train.max_steps?",
        ),
        "sequence length": (
            [*data, "--data.sequence_length=64"],
            None,
            2,
            "pretrain.py: error: data.sequence_length (64) must not exceed model.max_position_embeddings (32); "
            "shorten the one or raise the other.",
        ),
        "tokens per step": (
            [*data, "--train.tokens_per_step=200"],
            None,
            1,
            "error: train.tokens_per_step (200) must be a multiple of micro_batch_size x sequence_length x "
            "data-parallel processes = 8 x 16 x 1 = 128; set it to 128 or change micro_batch_size.",
        ),
        "empty corpus": (
            [],
            preparation_of(empty, shards, tmp_path),
            1,
            f"error: the corpus ({empty}) has no document but what is left out (1 empty); correct "
            "corpus.text_column, or give it some text in UTF-8.",
        ),
        "missing text": (
            [],
            preparation_of(missing, shards, tmp_path),
            1,
            f"error: corpus.paths: '{missing}' matches no file; correct the path, or quote the pattern.",
        ),
        "missing shards": (
            ["--data.path", tmp_path / "nowhere" / "at" / "all"],
            None,
            1,
            f"error: {tmp_path}/nowhere/at/all does not exist; give a directory of token shards, as "
            f"scripts/prepare_data.py makes it.",
        ),
        "token id": (
            ["--data.path", tmp_path / "wrong"],
            None,
            1,
            f"error: {file}: token id 60000 at position 7 is outside the vocabulary of 280; use the tokenizer that "
            f"the ids were made with, or prepare the data again.",
        ),
    }


NAMES = [
    "unknown key",
    "sequence length",
    "tokens per step",
    "empty corpus",
    "missing text",
    "missing shards",
    "token id",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_ends_in_one_line_within_seconds(write_recipe, shards, tmp_path, name):
    """Seconds of this process' own work, since the cores are shared with other tests."""
    arguments, data, code, line = mistakes(shards, tmp_path)[name]
    recipe_file = write_recipe(tmp_path, data=data)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = run("--config", recipe_file, *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (finished.returncode, finished.stdout, finished.stderr) == (code, "", line + "\n")
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < SECONDS
    assert not (tmp_path / "runs").exists()


def test_under_accelerate_launch_the_line_is_the_last_that_our_process_prints(write_recipe, shards, tmp_path):
    arguments, _, code, line = mistakes(shards, tmp_path)["tokens per step"]
    finished = launch("--config", write_recipe(tmp_path), *arguments, home=tmp_path)
    assert finished.returncode == code
    assert line in finished.stderr.splitlines()
    assert finished.stderr.splitlines()[-1] == line
