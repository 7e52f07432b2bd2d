"""The speed of data: windows per second from token shards, and text to token shards.

`python scripts/benchmark.py data [--tokens 50000000] [--rows 16] [--length 1024] [--seconds 3] [--rounds 3]
[--tokenizer DIR]`

Reading: gpt2x reads a step of its global order, shuffled over the whole set, with its checksum. The peers are
nanoGPT's way (a fresh memory map per batch, random offsets, one int64 conversion per row), random rows of a
memory-mapped `datasets` table in torch format, and the same by a shuffling DataLoader, which asks for a batch of rows
at once. All give (rows, length) int64 tensors from the same ids, hot in the page cache, on one thread; `gpt2x-ahead`
is what training sees: the time it waits for a batch that is read while it sleeps for two milliseconds.

Text to shards: see benchmarks/preparation.py; it needs --tokenizer, the directory of a tokenizer.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.contest import interleave, print_table
from benchmarks.preparation import compare
from gpt2x.batches.loader import TrainingBatches
from gpt2x.batches.order import GlobalOrder, Phase
from gpt2x.batches.read_ahead import ReadAhead
from gpt2x.batches.source import ShardSource
from gpt2x.shards.index import Index, load_index, write_index
from gpt2x.shards.writer import Vocabulary, write_documents

CONTESTANTS = ("gpt2x", "gpt2x-ahead", "nanogpt", "datasets", "datasets-loader")
VOCAB_SIZE, EOS = 50257, 50256


def write_data(directory: Path, *, num_tokens: int, length: int) -> None:
    """The same random ids as token shards, as nanoGPT's train.bin and as a `datasets` table."""
    ids = np.random.default_rng(0).integers(0, EOS, num_tokens, dtype=np.uint16)
    ids[999::1000] = EOS
    ids.tofile(directory / "train.bin")
    (directory / "shards" / "train").mkdir(parents=True)
    documents = np.arange(0, num_tokens + 1, 1000)
    vocabulary = Vocabulary(size=VOCAB_SIZE, eos_token_id=EOS, fingerprint="none")
    file = directory / "shards" / "train" / "tokens_part_00000.safetensors"
    entry = write_documents(file, vocabulary, tokens=ids, starts=documents, num_bytes=0)
    index = Index(
        directory=directory / "shards",
        splits={"train": [entry], "validation": []},
        tokenizer_fingerprint=vocabulary.fingerprint,
        vocab_size=vocabulary.size,
        eos_token_id=vocabulary.eos_token_id,
        recipe={},
    )
    write_index(index)
    rows = ids.reshape(-1, length).astype(np.int32)
    Dataset.from_dict({"input_ids": list(rows)}).save_to_disk(directory / "table")


def gpt2x_batches(directory: Path, rows: int, length: int) -> TrainingBatches:
    """What a run reads."""
    source = ShardSource(load_index(directory / "shards"), length)
    order = GlobalOrder(0, [Phase(sequences_per_step=rows, weights={source.name: 1.0})])
    return TrainingBatches(order, [source], micro_batch_size=rows)


def nanogpt_batch(directory: Path, rows: int, length: int) -> torch.Tensor:
    """nanoGPT's way: the map is opened anew for each batch, each row converted by itself."""
    ids = np.memmap(directory / "train.bin", dtype=np.uint16, mode="r")
    offsets = torch.randint(len(ids) - length, (rows,))
    return torch.stack([torch.from_numpy(ids[i : i + length].astype(np.int64)) for i in offsets])


def reader(contestant: str, directory: Path, rows: int, length: int) -> Callable[[int], torch.Tensor]:
    """Gives the batch of a step."""
    if contestant == "nanogpt":
        return lambda _: nanogpt_batch(directory, rows, length)
    if contestant.startswith("datasets"):
        table = load_from_disk(directory / "table").with_format("torch")
        if contestant == "datasets-loader":
            loader = iter(DataLoader(table, batch_size=rows, sampler=RandomSampler(table, num_samples=10**9)))
            return lambda _: next(loader)["input_ids"]
        generator = np.random.default_rng(0)
        return lambda _: torch.stack([table[int(i)]["input_ids"] for i in generator.integers(0, len(table), rows)])
    batches = gpt2x_batches(directory, rows, length)
    return lambda step: batches.step(step).micro_batches[0]["input_ids"]


def measure(contestant: str, directory: Path, *, rows: int, length: int, seconds: float) -> dict[str, float]:
    """Windows per second of one contestant in this process, on one thread."""
    torch.set_num_threads(1)
    if contestant == "gpt2x-ahead":
        return _measure_ahead(directory, rows=rows, length=length, seconds=seconds)
    read = reader(contestant, directory, rows, length)
    assert read(0).shape == (rows, length)
    assert read(1).dtype == torch.int64
    step, started = 2, time.perf_counter()
    while time.perf_counter() - started < seconds:
        read(step)
        step += 1
    elapsed = time.perf_counter() - started
    return {"windows_per_s": (step - 2) * rows / elapsed, "tokens_per_s": (step - 2) * rows * length / elapsed}


def _measure_ahead(directory: Path, *, rows: int, length: int, seconds: float) -> dict[str, float]:
    """The rate at which training gets windows that are read while it works: rows by the time that it waits."""
    ahead = ReadAhead(gpt2x_batches(directory, rows, length))
    ahead.step(0)
    waited, step, started = 0.0, 1, time.perf_counter()
    while time.perf_counter() - started < seconds:
        time.sleep(0.002)
        ahead.step(step)
        waited, step = waited + ahead.waited_s, step + 1
    ahead.close()
    return {"windows_per_s": (step - 1) * rows / waited, "tokens_per_s": (step - 1) * rows * length / waited}


def main(argv: list[str]) -> None:
    """Compares the contestants, or measures one of them."""
    parser = argparse.ArgumentParser(prog="benchmark.py data", description=__doc__.splitlines()[0])
    parser.add_argument("contestant", nargs="?", choices=CONTESTANTS, help="measure this one alone")
    parser.add_argument("--directory", type=Path, help="of the data, where a contestant is given")
    parser.add_argument("--tokens", type=int, default=50_000_000, help="size of the data")
    parser.add_argument("--rows", type=int, default=16, help="sequences per batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each contestant")
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer, to measure the preparation too")
    arguments = parser.parse_args(argv)
    sizes = {"rows": arguments.rows, "length": arguments.length, "seconds": arguments.seconds}
    if arguments.contestant:
        print(json.dumps(measure(arguments.contestant, arguments.directory, **sizes)))
        return
    with tempfile.TemporaryDirectory() as directory:
        num_tokens = arguments.tokens // (1000 * arguments.length) * 1000 * arguments.length
        write_data(Path(directory), num_tokens=num_tokens, length=arguments.length)
        flags = [f"--{name}={value}" for name, value in sizes.items()]
        results = interleave("data", CONTESTANTS, ["--directory", directory, *flags], rounds=arguments.rounds)
    print_table(results, against="nanogpt")
    if arguments.tokenizer is not None:
        print_table(compare(str(arguments.tokenizer), rounds=arguments.rounds), against="datasets")


if __name__ == "__main__":
    main(sys.argv[1:])
