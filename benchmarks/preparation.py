"""Preparation against its peer: seconds and memory from text to token files, on the same two cores.

`python -m benchmarks.preparation CONTESTANT TOKENIZER [MEGABYTES]` with one of

- gpt2x: `prepare` with its index, hashes and split;
- datasets: `datasets.map(batched=True, num_proc=2)` and a uint16 memory map, as nanoGPT's prepare.py does it;
- floor: `encode_batch_fast` alone, of texts that are in memory.

The corpus is Python sources of the installed packages, one document per file. The clock starts once everything is
imported and the tokenizer loaded, since a preparation of any length pays for these once.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from transformers import AutoTokenizer

from benchmarks.contest import interleave
from gpt2x.config import CorpusSection, PreparationRecipe, TokenizerSection
from gpt2x.corpus.documents import open_corpus
from gpt2x.corpus.text_files import Row, decoded
from gpt2x.distributed.launch import usable_cores
from gpt2x.preparation.prepare import prepare
from gpt2x.tokenizers.bpe import load_tokenizer, text_encoder

CONTESTANTS = ("gpt2x", "datasets", "floor")
TEXTS_PER_BATCH = 64


class MemoryPeak:
    """Watches the anonymous memory of this process and all its children, in bytes."""

    def __init__(self) -> None:
        self.peak, self.stopped = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryPeak":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stopped.wait(0.05):
            self.peak = max(self.peak, anonymous_memory())


def anonymous_memory() -> int:
    """RssAnon of this process and all its children, in bytes, from /proc."""
    return sum(_anonymous(Path(f"/proc/{process}")) for process in _family(os.getpid()))


def _family(process: int) -> Iterator[int]:
    yield process
    try:
        children = [file.read_text().split() for file in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:  # it has just ended
        return
    for child in (int(number) for numbers in children for number in numbers):
        yield from _family(child)


def _anonymous(process: Path) -> int:
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def write_corpus(directory: Path, megabytes: float) -> CorpusSection:
    """Copies Python sources of the installed packages as text files."""
    size = 0
    for number, text in enumerate(_sources()):
        (directory / f"{number:06d}.txt").write_bytes(text)
        size += len(text)
        if size > megabytes * 1e6:
            break
    return CorpusSection(kind="files", paths=[str(directory)])


def _sources() -> Iterator[bytes]:
    rows = open_corpus(CorpusSection(kind="python_packages"), lambda _: None).rows
    # Every ninth, so that no package rules.
    for row in islice(rows, 0, None, 9):
        content = Path(row.name).read_bytes()
        if isinstance(row, Row) and content.strip() and decoded(content) is not None:
            yield content


def run_gpt2x(corpus: CorpusSection, tokenizer: str, scratch: Path) -> int:
    """Returns the number of tokens."""
    section = TokenizerSection(path=tokenizer)
    index = prepare(PreparationRecipe(output_dir=scratch / "shards", corpus=corpus, tokenizer=section))
    return sum(index.total(split, "num_tokens") for split in index.splits)


def run_datasets(corpus: CorpusSection, tokenizer: str, scratch: Path) -> int:
    """nanoGPT's way: map to ids and lengths, split, write a memory map in 1024 parts."""
    encode, (directory,) = AutoTokenizer.from_pretrained(tokenizer), corpus.paths

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list]:
        found = [[*ids, encode.eos_token_id] for ids in encode(rows["text"], return_attention_mask=False)["input_ids"]]
        return {"ids": found, "len": [len(ids) for ids in found]}

    rows = datasets.load_dataset(
        "text", data_files=[f"{directory}/*.txt"], sample_by="document", split="train", cache_dir=str(scratch)
    )
    splits = rows.train_test_split(test_size=0.05, seed=2357, shuffle=True)
    tokenized = splits.map(tokenize, batched=True, remove_columns=["text"], num_proc=2)
    for name, split in tokenized.items():
        total = int(np.sum(split["len"], dtype=np.uint64))
        written = np.memmap(scratch / f"{name}.bin", np.uint16, mode="w+", shape=(total,))
        position, num_parts = 0, min(1024, len(split))
        for part in range(num_parts):
            ids = np.concatenate(split.shard(num_parts, part, contiguous=True).with_format("numpy")["ids"])
            written[position : position + len(ids)] = ids
            position += len(ids)
        written.flush()
    return sum(int(np.sum(split["len"])) for split in tokenized.values())


def run_floor(corpus: CorpusSection, tokenizer: str, scratch: Path) -> int:
    """The tokenizer alone."""
    encoder, (directory,) = text_encoder(load_tokenizer(tokenizer)), corpus.paths
    texts = [file.read_bytes().decode() for file in sorted(Path(directory).iterdir())]
    batches = (texts[start : start + TEXTS_PER_BATCH] for start in range(0, len(texts), TEXTS_PER_BATCH))
    return sum(len(e) + 1 for batch in batches for e in encoder.encode_batch_fast(batch, add_special_tokens=False))


RUNS: dict[str, Callable[[CorpusSection, str, Path], int]] = {
    "gpt2x": run_gpt2x,
    "datasets": run_datasets,
    "floor": run_floor,
}


def measure(contestant: str, tokenizer: str, megabytes: float) -> dict[str, float]:
    """One contestant in this process: wall and processor seconds, tokens per second, peak of anonymous memory."""
    datasets.disable_progress_bars()
    load_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as scratch, MemoryPeak() as memory:
        corpus = write_corpus(Path(directory), megabytes)
        started, used = time.perf_counter(), _processor_seconds()
        tokens = RUNS[contestant](corpus, tokenizer, Path(scratch))
        seconds, processor_seconds = time.perf_counter() - started, _processor_seconds() - used
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "anonymous_megabytes": memory.peak / 1e6,
    }


def _processor_seconds() -> float:
    return sum(os.times()[:4])  # its own and its finished children's


def compare(tokenizer: str, *, megabytes: float = 30, rounds: int = 3) -> dict[str, dict]:
    """Medians of every contestant, in processes of their own, by turns."""
    assert usable_cores() >= 2, "the peer's two processes need two cores"
    return interleave("preparation", CONTESTANTS, [tokenizer, str(megabytes)], rounds=rounds)


if __name__ == "__main__":
    contestant, tokenizer_path, *size = sys.argv[1:]
    print(json.dumps(measure(contestant, tokenizer_path, float(size[0]) if size else 30)))
