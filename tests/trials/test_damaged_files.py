"""Every kind of file that gpt2x reads back, mutated at random: through its reader, and under the command it is for.

Nothing may hang, print a traceback, or go on with what was damaged: a command refuses in a line, or takes what is
older, or makes the file again and ends in the same bytes as if nothing had been.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / "training"), str(ROOT / "tests")]

from forked_runs import ForkedRuns  # noqa: E402
from mutations import mutate, restore  # noqa: E402
from same_bytes import sums  # noqa: E402

from gpt2x import files  # noqa: E402
from gpt2x.checkpoints.format import newest_checkpoint  # noqa: E402
from gpt2x.config import CorpusSection, PreparationRecipe, TokenizerSection  # noqa: E402
from gpt2x.errors import UserError  # noqa: E402
from gpt2x.locate import find_model  # noqa: E402
from gpt2x.preparation.prepare import prepare  # noqa: E402
from gpt2x.publishing.published_model import PublishedModel  # noqa: E402
from gpt2x.reporting import read_metrics  # noqa: E402
from gpt2x.runs.directory import RunDirectory, locked  # noqa: E402
from gpt2x.runs.records import truncate_records  # noqa: E402
from gpt2x.runs.results import RunFiles  # noqa: E402
from gpt2x.shards.files import open_shard  # noqa: E402
from gpt2x.shards.index import load_index  # noqa: E402
from gpt2x.streams.ledger import read_ledger  # noqa: E402

pytestmark = pytest.mark.trial

WORDS = ["def", "return", "(", ")", ":", "\n", "self", "value", "=", "1", "naïve", "if"]
THROUGH_READER, THROUGH_COMMAND = 500, 20
LAST = "runs/tiny/checkpoints/step-000013"


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        file: a pattern of where it lies in the world.
        read: reads it in this process, by the world's directory.
        command: reads it as a user does: a script and its arguments.
        ends_alike: what the command must leave as if nothing had been, wherever it succeeds.
        may_fail: whether a refusal in one line is right as well.
    """

    file: str
    read: Callable[[Path], object]
    command: tuple[str, ...]
    ends_alike: tuple[str, ...] = ()
    may_fail: bool = False


def open_train_shards(world):
    load_index(world / "shards").open_split("train")


def read_model(world):
    find_model(str(world / "runs/stream/final"))
    RunFiles.of(world / "runs/stream")
    PublishedModel.of(world / "runs/stream")


def take_lock(world):
    with locked(world / "runs/tiny"):
        pass


def finish_preparation(world):
    prepare(preparation(world, output="parts"))


PRETRAIN = ("pretrain.py", "--config", "{world}/tiny.yaml")
AGAIN = ("pretrain.py", "--config", "{world}/tiny.yaml", "--run.name", "other")
STREAM = ("pretrain.py", "--config", "{world}/stream.yaml")
RUN = ("runs/tiny/final", "runs/tiny/checkpoints/step-000014")
KINDS = {
    "manifest": Kind(f"{LAST}/manifest.json", lambda w: newest_checkpoint(w / "runs/tiny"), PRETRAIN, RUN),
    "trainer": Kind(f"{LAST}/state/trainer.json", lambda w: newest_checkpoint(w / "runs/tiny"), PRETRAIN, RUN),
    "lock": Kind("runs/tiny/run.lock", take_lock, PRETRAIN, RUN, may_fail=True),
    "lease": Kind("runs/tiny/run.lease", take_lock, PRETRAIN, RUN, may_fail=True),
    "metrics": Kind("runs/tiny/metrics.jsonl", lambda w: read_metrics(w / "runs/tiny"), PRETRAIN, RUN, may_fail=True),
    "records": Kind(
        "runs/tiny/samples.jsonl",
        lambda w: truncate_records(RunDirectory(w / "runs/tiny"), step=8, is_followed_up=True),
        *(PRETRAIN, RUN),
        may_fail=True,
    ),
    # Not its checkpoints: they say how far ahead of the training the cache was filled.
    "ledger": Kind("cache/ledger.json", lambda w: read_ledger(w / "cache"), STREAM, ("runs/stream/final",)),
    "task record": Kind(
        "parts/tasks/task_00000.json",
        finish_preparation,
        ("prepare_data.py", "--config", "{world}/parts.yaml"),
        ("parts",),
        may_fail=True,  # where somebody's directory has its name, which is not removed
    ),
    "index": Kind("shards/index.json", open_train_shards, AGAIN, ("runs/other/checkpoints",), may_fail=True),
    "shard header": Kind(
        "shards/train/tokens_part_00000.safetensors",
        lambda w: open_shard(w / "shards/train/tokens_part_00000.safetensors"),
        *(AGAIN, ("runs/other/checkpoints",)),
        may_fail=True,
    ),
    "scan cache": Kind("hf/gpt2x/scan-*.json", open_train_shards, AGAIN, ("runs/other/checkpoints",)),
    "model config": Kind(
        "runs/stream/final/config.json",
        read_model,
        ("generate.py", "{world}/runs/stream/final", "--max_new_tokens", "2", "--prompt", "def"),
        may_fail=True,
    ),
}


def preparation(world, *, output, num_tasks=3):
    return PreparationRecipe(
        output_dir=world / output,
        corpus=CorpusSection(kind="files", paths=[f"{world}/texts"], validation_fraction=0.2),
        tokenizer=TokenizerSection(path=str(world / "tokenizer"), vocab_size=280),
        num_tasks=num_tasks,
        num_workers=1,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("output")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(directory / "world" / "hf"))
        forked = ForkedRuns(directory)
    yield forked
    forked.close()


@pytest.fixture(scope="module")
def world(runs, tmp_path_factory):
    """A run that was stopped, a finished one on a stream, finished and half finished shards; and a copy of it all."""
    world = runs.directory / "world"
    (world / "texts").mkdir(parents=True)
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(40, 400))) for _ in range(40)]
    for number, text in enumerate(texts):
        (world / "texts" / f"{number:02d}.txt").write_text(text)
    (world / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = {"kind": "files", "paths": [f"{world}/texts"], "validation_fraction": 0.2}
    parts = {
        "output_dir": f"{world}/parts",
        "corpus": corpus,
        "tokenizer": {"path": f"{world}/tokenizer", "vocab_size": 280},
        "num_tasks": 3,
        "num_workers": 1,
    }
    recipe = {
        "run": {"dir": f"{world}/runs"},
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32},
        "data": {"path": f"{world}/shards", "sequence_length": 16},
        "train": {"max_steps": 14, "save_steps": 4, "save_total_limit": 2, "num_threads": 1, "mixed_precision": "no"}
        | {"tokens_per_step": 128, "micro_batch_size": 8},
        "evaluation": {"eval_steps": 6, "sample_steps": 6, "num_validation_prompts": 1, "max_new_tokens": 4},
    }
    stream = {
        "corpus": {"kind": "dataset", "dataset": "json", "data_files": [f"{world}/rows.jsonl"]},
        "tokenizer": f"{world}/tokenizer",
        "cache_dir": f"{world}/cache",
        "max_cached_shards": 4,
        "shards_per_era": 2,
        "tokens_per_shard": 800,
    }
    stream["corpus"]["validation_fraction"] = 0.2
    streaming = recipe | {"data": {"stream": stream, "sequence_length": 16}}
    for name, content in (("parts", parts), ("tiny", recipe), ("stream", streaming)):
        (world / f"{name}.yaml").write_text(yaml.safe_dump(content))

    prepare(preparation(world, output="shards", num_tasks=1))
    prepare_two_of_three(world)
    code, output = runs.run("--config", world / "stream.yaml", "--train.max_steps", "6")
    assert code == 0, output
    stop = "gpt2x.training.loop:optimizer_step:before:13:SIGTERM"
    code, output = runs.run("--config", world / "tiny.yaml", at=stop)
    assert code == 143, output
    leave_lock(world / "runs/tiny")
    pristine = runs.directory / "pristine"
    shutil.copytree(world, pristine)
    return world


def leave_lock(run_dir):
    """What a killed run leaves: its lock and a lease of a process that is no more."""
    code = "import sys, time; from pathlib import Path; from gpt2x.runs.directory import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print('locked', flush=True)\n    time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "locked\n"
        process.kill()
    assert (run_dir / "run.lock").exists()
    assert (run_dir / "run.lease").exists()


def prepare_two_of_three(world):
    for task in ("0", "1"):
        script = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--config", str(world / "parts.yaml")]
        subprocess.run([*script, "--task", task], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (world / "parts" / "tasks" / "task_00000.json").is_file()


@pytest.fixture(scope="module")
def undisturbed(world, runs):
    """What each command leaves where nothing has happened."""
    expected = {}
    for name, kind in KINDS.items():
        restore(world.with_name("pristine"), world)
        code, output = run_command(runs, kind, world)
        assert code == 0, output
        expected[name] = left(kind, world)
    return expected


def left(kind, world):
    """The sums of what must not depend on what has happened."""
    found = {}
    for name in kind.ends_alike:
        path = world / name
        found |= sums(path) if path.is_dir() else {name: sums(path.parent)[path.name]}
    return found


def run_command(runs, kind, world):
    script, *arguments = (part.format(world=world) for part in kind.command)
    started = runs.start(*arguments, script=script)
    with time_limit(60):
        return started.wait()


@contextmanager
def time_limit(seconds):
    def expire(*_):
        raise TimeoutError(f"nothing happened for {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_file(world, kind):
    return sorted(world.glob(kind.file))[0]


@pytest.mark.parametrize("name", KINDS)
def test_five_hundred_mutations_are_damaged_or_harmless_to_the_reader(name, world, monkeypatch):
    monkeypatch.setattr(files, "LEASE_S", 0.2)
    monkeypatch.setattr(files, "SILENT_S", 0.02)
    monkeypatch.setattr("gpt2x.scan.cache_dir", lambda: world / "hf" / "gpt2x")
    kind, rng = KINDS[name], random.Random(name)
    restore(world.with_name("pristine"), world)
    top = Path(kind.file).parts[0]
    for number in range(THROUGH_READER):
        restore(world.with_name("pristine") / top, world / top)
        what = mutate(one_file(world, kind), rng)
        try:
            with time_limit(20), suppress(UserError, files.DamagedError):
                kind.read(world)
        except Exception as error:
            raise AssertionError(f"mutation {number} ({what}) of {name} gave {error!r}") from error


@pytest.mark.parametrize("name", KINDS)
def test_under_twenty_mutations_the_command_refuses_in_a_line_or_ends_alike(name, world, runs, undisturbed):
    kind, rng = KINDS[name], random.Random(f"{name} command")
    for number in range(THROUGH_COMMAND):
        restore(world.with_name("pristine"), world)
        what = mutate(one_file(world, kind), rng)
        code, output = run_command(runs, kind, world)
        told = f"mutation {number} ({what}) of {name}: {output[-2000:]}"
        assert "Traceback" not in output, told
        assert code in ((0, 1) if kind.may_fail else (0,)), told
        if code == 0:
            found, expected = left(kind, world), undisturbed[name]
            assert [path for path in found | expected if found.get(path) != expected.get(path)] == [], told
        else:
            assert output.strip().split("\n")[-1].startswith("error: "), told
