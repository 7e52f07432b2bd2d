"""Memory that does not grow with the corpus."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt2x.config import TokenizerSection
from gpt2x.shards.files import write_shard
from gpt2x.shards.index import Index, ShardEntry, write_index
from gpt2x.shards.tokenizer import save_tokenizer, tokenizer_fingerprint, train_tokenizer, vocabulary_size

ROOT = Path(__file__).parents[2]


def write_data(directory, *, num_shards):
    """Shards of two million tokens each, and the tokenizer that might have made them."""
    tokenizer = train_tokenizer(["some text of no matter"] * 3, TokenizerSection(path="x", vocab_size=262))
    fingerprint, vocab_size = tokenizer_fingerprint(tokenizer), vocabulary_size(tokenizer)
    splits = {"train": [], "validation": []}
    for split, count in (("train", num_shards), ("validation", 1)):
        (directory / split).mkdir(parents=True)
        for number in range(count):
            size = 2_000_000 if split == "train" else 2_000
            tokens = np.random.default_rng(number).integers(1, vocab_size, size).astype(np.uint16)
            tokens[-1] = tokenizer.eos_token_id
            file = directory / split / f"tokens_part_{number:05d}.safetensors"
            documents = np.array([0, size])
            sha256 = write_shard(
                file, tokens=tokens, documents=documents, metadata={"tokenizer_fingerprint": fingerprint}
            )
            splits[split].append(
                ShardEntry(file=file.name, num_tokens=size, num_documents=1, num_bytes=size, sha256=sha256)
            )
    save_tokenizer(tokenizer, directory / "tokenizer")
    eos = tokenizer.eos_token_id
    write_index(
        Index(
            directory=directory,
            splits=splits,
            tokenizer_fingerprint=fingerprint,
            vocab_size=vocab_size,
            eos_token_id=eos,
            recipe={},
        )
    )


def peak_anonymous_mb(command, *, directory):
    """The largest RssAnon of a process while it runs: memory of its own, without mapped files."""
    process = subprocess.Popen(
        [*map(str, command)], cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = 0.0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, int(found[1]) / 1000 if found else 0.0)
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


@pytest.mark.trial
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc, which Linux has")
def test_training_on_ten_times_the_data_takes_no_more_memory(tmp_path):
    peaks = {}
    for num_shards in (4, 40):
        write_data(tmp_path / f"data-{num_shards}", num_shards=num_shards)
        command = [sys.executable, ROOT / "scripts" / "pretrain.py", "--data.path", f"data-{num_shards}"]
        options = {
            "run.name": f"run-{num_shards}",
            "data.preparation": "null",
            "data.sequence_length": 64,
            "train.max_steps": 30,
            "train.num_threads": 1,
            "train.tokens_per_step": 8192,
            "train.micro_batch_size": 32,
            "train.torch_compile": "false",
            "model.hidden_size": 32,
            "model.num_hidden_layers": 2,
            "evaluation.max_new_tokens": 4,
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        peaks[num_shards] = peak_anonymous_mb([*command, *flags], directory=tmp_path)
    print(peaks)
    assert peaks[40] - peaks[4] < 50
