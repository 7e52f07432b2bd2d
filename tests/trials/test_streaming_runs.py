"""The training script on streams: a bad network, one and two processes, kills and resumes; and how long it waits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from flaky_hub import ACCIDENTS, flaky_hub
from test_streaming_trials import NAMES, NUM_FILES, ROOT, ShardCounter, files_of

from gpt2x.config import TokenizerSection
from gpt2x.tokenizers.bpe import save_tokenizer, train_tokenizer

NUM_STEPS, WEIGHTS = 170, (0.5, 0.3, 0.2)
MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 16}


@pytest.fixture
def hub():
    with flaky_hub({f"team/{name}": files_of(name) for name in NAMES}) as server:
        yield server


@pytest.fixture
def tokenizer_dir(tmp_path):
    texts = [
        json.loads(line)["text"] for name in NAMES for file in files_of(name).values() for line in file.splitlines()
    ]
    path = tmp_path / "tokenizer"
    save_tokenizer(train_tokenizer(texts, TokenizerSection(path=str(path), vocab_size=300)), path)
    return path


def write_recipe(directory, tokenizer_dir):
    """Three streams of three cached shards each."""

    def source(name, weight):
        files = [f"hf://datasets/team/{name}/part-{number}.jsonl" for number in range(NUM_FILES)]
        corpus = {"kind": "dataset", "dataset": "json", "data_files": files, "validation_fraction": 0.25}
        stream = {"corpus": corpus, "tokenizer": str(tokenizer_dir), "cache_dir": str(directory / "cache" / name)}
        limits = {"max_cached_shards": 3, "shards_per_era": 1, "tokens_per_shard": 600, "stall_s": 8, "retry_s": 60}
        return {"name": name, "weight": weight, "stream": {**stream, **limits}}

    recipe = {
        "run": {"dir": str(directory), "name": "run"},
        "model": MODEL,
        "data": {
            "sources": [source(*pair) for pair in zip(NAMES, WEIGHTS, strict=True)],
            "sequence_length": 16,
            "block_size": 48,
        },
        "train": {"max_steps": NUM_STEPS, "tokens_per_step": 768, "micro_batch_size": 8, "save_steps": 4},
        "evaluation": {"eval_steps": None, "num_validation_prompts": 0},
    }
    recipe["train"] |= {"mixed_precision": "no", "num_threads": 1}
    directory.mkdir()
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return directory / "recipe.yaml"


def launch(recipe_file, hub, num_processes, *overrides):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if num_processes == 2:
        launcher += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(recipe_file.parent / "hf")} if hub else {}
    return subprocess.Popen(
        [*launcher, str(ROOT / "scripts" / "pretrain.py"), "--config", str(recipe_file), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def records(directory):
    lines = (directory / "run" / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return [record for record in map(json.loads, lines) if "train/loss" in record]


def kill_after(process, directory, step):
    """Kills launcher and processes together when a step is recorded."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (directory / "run" / "metrics.jsonl").exists() and len(records(directory)) >= step:
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def finish(process):
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


@pytest.mark.trial
def test_streams_over_a_bad_network_killed_twice_on_one_and_two_processes_give_the_same_samples(
    hub, tokenizer_dir, tmp_path
):
    undisturbed = write_recipe(tmp_path / "undisturbed", tokenizer_dir)
    finish(launch(undisturbed, hub, 1))
    expected = [record["data/checksum"] for record in records(undisturbed.parent)]
    last = records(undisturbed.parent)[-1]
    assert len(set(expected)) == NUM_STEPS
    assert min(last[f"data/{name}/epochs"] for name in NAMES) >= 2

    hub.requests.clear()
    hub.accidents = ACCIDENTS
    recipe = write_recipe(tmp_path / "disturbed", tokenizer_dir)
    counter = ShardCounter(recipe.parent)
    counter.start()
    kill_after(launch(recipe, hub, 2), recipe.parent, 41)
    shutil.rmtree(recipe.parent / "cache")
    kill_after(launch(recipe, hub, 1), recipe.parent, 86)
    finish(launch(recipe, hub, 2))
    counter.ended.set()
    found = records(recipe.parent)
    assert [record["step"] for record in found] == list(range(1, NUM_STEPS + 1))
    assert [record["data/checksum"] for record in found] == expected
    losses = [[record["train/loss"] for record in run] for run in (found, records(undisturbed.parent))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert max(counter.most.values()) == 3


@pytest.mark.trial
def test_training_does_not_wait_for_a_stream_that_is_faster_than_the_model(tokenizer_dir, tmp_path):
    """Rows from a local file, which are tokenized many times faster than this model trains."""
    recipe = write_recipe(tmp_path / "local", tokenizer_dir)
    content = yaml.safe_load(recipe.read_text())
    for source in content["data"]["sources"]:
        file = tmp_path / f"{source['name']}.jsonl"
        file.write_bytes(b"".join(files_of(source["name"]).values()) * 20)
        source["stream"]["corpus"]["data_files"] = [str(file)]
        source["stream"] |= {"tokens_per_shard": 20_000, "max_cached_shards": 8, "shards_per_era": 2}
    content["model"] |= {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    recipe.write_text(yaml.safe_dump(content))
    finish(launch(recipe, None, 1, "--train.max_steps=300"))
    found = records(recipe.parent)[1:]  # the first step begins when the first shards are there
    waited = sum(record["data/waited_s"] for record in found)
    elapsed = found[-1]["elapsed_s"] - found[0]["elapsed_s"]
    print(f"waited {waited:.3f} s of {elapsed:.1f} s")
    assert waited < 0.01 * elapsed
