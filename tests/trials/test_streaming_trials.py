"""Streams over a network that resets, stalls, is overloaded and goes away, in a run that is killed and resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from flaky_hub import ACCIDENTS, flaky_hub

from gpt2x.config import TokenizerSection
from gpt2x.tokenizers.bpe import save_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
NAMES, NUM_FILES, DOCUMENTS_PER_FILE = ("web", "code", "books"), 4, 30
LENGTH, DRAWS_PER_STEP, STEPS_PER_CHECKPOINT, MAX_SHARDS = 16, 8, 4, 3

# Reads three streams step by step, notes the hash of every step, and saves what a checkpoint holds.
RUN = """
import hashlib, json, os, sys
from pathlib import Path
import numpy as np
from gpt2x.batches.stream import StreamSource
from gpt2x.config import CorpusSection, StreamSection
from gpt2x.errors import exit_on_user_error
from gpt2x.files import write_file

run, endpoint_files, num_steps = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
checkpoint = run / "checkpoint.json"
saved = json.loads(checkpoint.read_text()) if checkpoint.is_file() else {"step": 0, "hashes": [], "sources": {}}
hashes = saved["hashes"]

def section(name, corpus):
    return StreamSection(corpus=CorpusSection(**corpus), tokenizer=str(run.parent / "tokenizer"),
        cache_dir=run / "cache" / name, max_cached_shards=MAX_SHARDS, shards_per_era=1, tokens_per_shard=600,
        retry_s=RETRY_S, stall_s=STALL_S)

with exit_on_user_error():
    sources = {name: StreamSource(section(name, corpus), LENGTH, name=name, state=saved["sources"].get(name))
        for name, corpus in endpoint_files.items()}
    for step in range(saved["step"], num_steps):
        digest = hashlib.sha256()
        for source in sources.values():
            source.release(step * DRAWS)
            source.require((step + 1) * DRAWS)
            digest.update(source.sequences(np.arange(step * DRAWS, (step + 1) * DRAWS)).ids.tobytes())
        hashes.append(digest.hexdigest())
        if (step + 1) % CHECKPOINT_STEPS == 0:
            states = {name: source.state((step + 1) * DRAWS) for name, source in sources.items()}
            content = {"step": step + 1, "hashes": hashes, "sources": states}
            write_file(checkpoint, json.dumps(content).encode())
        print(json.dumps({"step": step + 1, "hash": hashes[-1]}), flush=True)
    epochs = [source.epochs(num_steps * DRAWS) for source in sources.values()]
    (run / "finished.json").write_text(json.dumps({"hashes": hashes, "epochs": epochs}))
    for source in sources.values():
        source.close()
"""


def files_of(name):
    generator = random.Random(name)
    words = ["".join(generator.choices("abcdefgh", k=5)) for _ in range(100)]
    texts = [
        [
            f"{name} {file} {row} " + " ".join(generator.choices(words, k=generator.randint(5, 40)))
            for row in range(DOCUMENTS_PER_FILE)
        ]
        for file in range(NUM_FILES)
    ]
    return {
        f"part-{number}.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in file).encode()
        for number, file in enumerate(texts)
    }


@pytest.fixture
def hub():
    with flaky_hub({f"team/{name}": files_of(name) for name in NAMES}) as server:
        yield server


@pytest.fixture
def corpora():
    """Two by files, one by the id of the data set."""
    common = {"kind": "dataset", "validation_fraction": 0.1}
    by_files = {
        name: {
            **common,
            "dataset": "json",
            "data_files": [f"hf://datasets/team/{name}/part-{number}.jsonl" for number in range(NUM_FILES)],
        }
        for name in NAMES[:2]
    }
    return {**by_files, "books": {**common, "dataset": "team/books"}}


@pytest.fixture
def start(hub, corpora, tmp_path):
    """Starts a run in a directory."""
    texts = [
        json.loads(line)["text"] for name in NAMES for file in files_of(name).values() for line in file.splitlines()
    ]
    section = TokenizerSection(path=str(tmp_path / "tokenizer"), vocab_size=300)
    save_tokenizer(train_tokenizer(texts, section), tmp_path / "tokenizer")

    def start_one(run, num_steps, *, retry_s=60.0, stall_s=8.0):
        constants = {"LENGTH": LENGTH, "DRAWS": DRAWS_PER_STEP, "CHECKPOINT_STEPS": STEPS_PER_CHECKPOINT,
                     "MAX_SHARDS": MAX_SHARDS, "RETRY_S": retry_s, "STALL_S": stall_s}  # fmt: skip
        code = "".join(f"{name} = {value}\n" for name, value in constants.items()) + RUN
        (tmp_path / run).mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / run / "hf")}
        command = [sys.executable, "-c", code, str(tmp_path / run), json.dumps(corpora), str(num_steps)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    return start_one


def kill_after(process, step):
    for line in process.stdout:
        if json.loads(line)["step"] >= step:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()


class ShardCounter(threading.Thread):
    """The largest number of training shards that each cache of a run ever holds, whole or in the making."""

    def __init__(self, run: Path) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.most, self.ended = run, Counter(), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            for train in self.run_dir.glob("cache/*/train"):
                try:
                    self.most[train.parent.name] = max(self.most[train.parent.name], len(os.listdir(train)))
                except FileNotFoundError:
                    continue


@pytest.mark.trial
def test_three_streams_over_a_bad_network_killed_twice_give_what_an_undisturbed_run_gives(hub, start, tmp_path):
    num_steps = 190
    undisturbed = start("undisturbed", num_steps)
    _, errors = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, errors
    expected = json.loads((tmp_path / "undisturbed" / "finished.json").read_text())
    assert min(expected["epochs"]) >= 2
    assert len(set(expected["hashes"])) == num_steps

    hub.requests.clear()
    hub.accidents = ACCIDENTS
    counter = ShardCounter(tmp_path / "disturbed")
    counter.start()
    kill_after(start("disturbed", num_steps), 41)
    shutil.rmtree(tmp_path / "disturbed" / "cache")
    kill_after(start("disturbed", num_steps), 86)
    last = start("disturbed", num_steps)
    _, errors = last.communicate(timeout=600)
    assert last.returncode == 0, errors
    counter.ended.set()
    assert json.loads((tmp_path / "disturbed" / "finished.json").read_text()) == expected
    assert {hub.met[accident] > 0 for accident in ("reset", "503", "stall", "429")} == {True}
    assert counter.most == Counter(dict.fromkeys(NAMES, MAX_SHARDS))


@pytest.mark.trial
def test_a_server_that_goes_away_ends_the_run_with_the_source_named_and_the_run_goes_on_when_it_is_back(
    hub, start, tmp_path
):
    run = start("broken", 130, retry_s=4.0, stall_s=60.0)
    for line in run.stdout:
        if json.loads(line)["step"] == 6:
            hub.is_down = True
            break
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 1
    last_line = errors.strip().split("\n")[-1]
    assert last_line.startswith("error: stream '")
    assert "team/" in last_line
    assert "503" in last_line
    hub.is_down = False
    started = time.monotonic()
    run = start("broken", 130)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert time.monotonic() - started < 200
    undisturbed = start("undisturbed", 130)
    undisturbed.communicate(timeout=300)
    results = [json.loads((tmp_path / name / "finished.json").read_text()) for name in ("broken", "undisturbed")]
    assert results[0] == results[1]
