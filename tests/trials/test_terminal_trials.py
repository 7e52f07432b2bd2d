"""Real runs whose terminal, pipe or log gives up, or knows few characters: they end as if nothing had been."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "training"))

from forked_runs import read_records  # noqa: E402

from gpt2x.checkpoints.format import list_checkpoints  # noqa: E402

pytestmark = pytest.mark.trial

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "ACCELERATE_LOG_LEVEL": "error",
}
ONE, TWO = ROOT / "accelerate_configs" / "cpu.yaml", ROOT / "accelerate_configs" / "cpu_2_processes.yaml"
PROMPT = "⟦naïve 日本⟧"
TINY = {
    "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 96},
    "data": {"sequence_length": 16},
    "train": {"max_steps": 12, "save_steps": 4, "tokens_per_step": 128, "micro_batch_size": 4, "num_threads": 1}
    | {"mixed_precision": "no"},
    "evaluation": {"eval_steps": 6, "sample_steps": 6, "prompts": [PROMPT], "max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Token shards, prepared with a full disk behind stdout and stderr; and the recipes of tiny runs."""
    home = tmp_path_factory.mktemp("home")
    for number in range(30):
        words = " ".join(f"def value_{number} = {step} naïve" for step in range(60))
        (home / f"{number}.txt").write_text(words, encoding="utf-8")
    corpus = {"kind": "files", "paths": ["*.txt"], "validation_fraction": 0.2}
    recipe = {"output_dir": "shards", "corpus": corpus, "tokenizer": {"path": "./bpe", "vocab_size": 300}}
    (home / "data.yaml").write_text(yaml.safe_dump(recipe))
    code, _, _ = shell(home, f"python {ROOT}/scripts/prepare_data.py --config data.yaml > /dev/full 2>&1")
    assert code == 0
    tiny = TINY | {"data": {"path": "shards", "sequence_length": 16}}
    (home / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    return home


def shell(home, line, **environment):
    """(exit code, stdout, stderr) of a line of bash."""
    ran = subprocess.run(
        ["bash", "-c", line], cwd=home, env=ENVIRONMENT | environment, capture_output=True, timeout=120
    )
    return ran.returncode, ran.stdout.decode("utf-8", "replace"), ran.stderr.decode("utf-8", "replace")


def launch(name, config=ONE):
    script = f"{ROOT}/scripts/pretrain.py --config tiny.yaml --run.name {name}"
    return f"accelerate launch --quiet --config_file {config} {script}"


def left_by(run_dir):
    """All that a run leaves which a terminal could have changed."""
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sample["prompt"] for sample in samples] != []
    return read_records(run_dir), samples, (run_dir / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(home):
    """What the run leaves that nothing has happened to."""
    code, _, errors = shell(home, launch("straight"))
    assert code == 0, errors
    return left_by(home / "runs" / "straight")


PLACES = {
    "a reader of one line": "{} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}",
    "a tee that is killed": "{} | (read line; exec sleep 0); exit ${{PIPESTATUS[0]}}",
    "a full disk": "{} > /dev/full 2>&1",
    "nowhere": "{} >&- 2>&-",
    "latin-1": "PYTHONIOENCODING=latin-1:strict {}",
    "the C locale": "LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 {}",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_ends_well_wherever_its_words_go(home, straight, place):
    name = place.replace(" ", "-")
    code, output, errors = shell(home, PLACES[place].format(launch(name)))
    assert (code, "Traceback" in output + errors) == (0, False), output + errors
    assert left_by(home / "runs" / name) == straight


def test_two_processes_whose_reader_goes_away_end_well(home):
    code, output, errors = shell(home, f"{launch('two', TWO)} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}")
    assert (code, "Traceback" in output + errors) == (0, False), output + errors
    records, samples, _ = left_by(home / "runs" / "two")
    assert (records[-1]["step"], samples[-1]["step"]) == (12, 12)


def test_a_run_whose_terminal_is_closed_ends_well(home, straight):
    master, terminal = pty.openpty()
    run = subprocess.Popen(
        ["bash", "-c", f"exec {launch('terminal')}"],
        cwd=home,
        env=ENVIRONMENT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    os.read(master, 1)  # something is said
    os.close(master)
    assert run.wait(timeout=120) == 0
    assert left_by(home / "runs" / "terminal") == straight


def test_fine_tuning_shows_what_is_learned_and_a_model_writes_whatever_the_encoding(home, straight):
    rows = [{"prompt": f"value {n}, naïve?", "completion": f"= {n} é" * 3} for n in range(40)]
    (home / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preparation = {
        "output_dir": "chats",
        "corpus": {"kind": "files", "paths": ["chats.jsonl"], "validation_fraction": 0.2},
        "tokenizer": {"path": "runs/straight/final"},
        "chat": {"template": "tokenization/plain.jinja"},
    }
    recipe = TINY | {
        "init_from": "runs/straight",
        "data": {"preparation": preparation, "sequence_length": 64, "packing": "whole_documents"},
    }
    recipe.pop("model")
    (home / "chat.yaml").write_text(yaml.safe_dump(recipe))
    finetune = f"python {ROOT}/scripts/finetune.py --config chat.yaml --train.tokens_per_step 512"
    code, output, errors = shell(home, finetune, PYTHONIOENCODING="ascii")
    assert (code, "\\u27e6= 0 \\xe9" in output or "\\u27e6= 1 \\xe9" in output) == (0, True), output + errors
    assert len((home / "runs" / "chat" / "samples.jsonl").read_text(encoding="utf-8").splitlines()) >= 2
    generate = f"python {ROOT}/scripts/generate.py runs/straight --prompt '{PROMPT}' --max_new_tokens 8"
    code, output, errors = shell(home, generate, PYTHONIOENCODING="ascii")
    assert (code, output.startswith("\\u27e6na\\xefve \\u65e5\\u672c\\u27e7")) == (0, True), output + errors
    code, output, errors = shell(
        home, f"yes x | {generate.partition(' --prompt')[0]} | head -1; exit ${{PIPESTATUS[1]}}"
    )
    assert (code, errors) == (128 + signal.SIGPIPE, "")


def endless(home, name, *, shell):
    """A run of two processes that does not end by itself, after its first step."""
    line = launch(name, TWO) + " --train.max_steps 100000 --train.save_steps 100000"
    launcher = subprocess.Popen(
        ["bash", "-c", shell.format(line)],
        cwd=home,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    run_dir = home / "runs" / name
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2)  # both have finished a step
    return launcher, run_dir


def test_sigusr1_to_all_processes_saves_where_the_launcher_was_told_to_leave_it_to_them(home):
    """As docs/examples/pretrain.slurm does, where scancel --signal reaches the launcher as well."""
    launcher, run_dir = endless(home, "usr1", shell="trap '' USR1; exec {}")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in (launcher.pid, *map(int, children)):
        os.kill(pid, signal.SIGUSR1)
    wait_until(lambda: list_checkpoints(run_dir))
    asked_at = read_records(run_dir)[-1]["step"]
    wait_until(lambda: read_records(run_dir)[-1]["step"] > asked_at + 10)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=60)
    assert output.count(b"SIGUSR1: saving after this step, and going on.") == 2
    assert len(list_checkpoints(run_dir)) == 2, output


def test_sigusr1_to_a_launcher_ends_it_and_the_run_is_saved(home):
    launcher, run_dir = endless(home, "launcher", shell="exec {}")
    launcher.send_signal(signal.SIGUSR1)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == -signal.SIGUSR1
    assert output.count(b"the launcher is gone.") >= 1
    wait_until(lambda: not (run_dir / "run.lock").exists())
    assert len(list_checkpoints(run_dir)) == 1, output


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
