"""Memory that does not grow with the corpus, nor with a document of it."""

import gzip
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from gpt2x.config import TokenizerSection
from gpt2x.corpus.text_files import MAX_ROW_BYTES
from gpt2x.shards.files import write_shard
from gpt2x.shards.index import Index, ShardEntry, load_index, write_index
from gpt2x.tokenizers.bpe import save_tokenizer, tokenizer_fingerprint, train_tokenizer, vocabulary_size

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


def peak_anonymous_mb(command, *, directory, code=0):
    """The largest RssAnon of a process while it runs: memory of its own, without mapped files. Its standard error goes
    into the file `said`."""
    with (directory / "said").open("w") as said:
        process = subprocess.Popen([*map(str, command)], cwd=directory, stdout=subprocess.DEVNULL, stderr=said)
    peak = 0.0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, int(found[1]) / 1000 if found else 0.0)
        time.sleep(0.05)
    assert process.returncode == code
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


WORDS = "some words of a text that has no line end at all "
SIZE = 300_000_000


def write_text(file, parts):
    with gzip.open(file, "wt", compresslevel=1) if file.suffix == ".gz" else file.open("w") as stream:
        for part in parts:
            stream.write(part)


def words(size):
    return (WORDS * 1000 for _ in range(size // len(WORDS) // 1000))


def row(before, after):
    """A row that can just be held; one emoji makes every letter of it four bytes in Python."""
    return [before, "\U0001f600", *words(MAX_ROW_BYTES - 100_000), after]


# The file, what is written into it, and the separator.
LONG_TEXTS = {
    "words without a line end": ("a.txt", lambda: words(SIZE), None),
    "words without a separator": ("a.txt", lambda: words(SIZE), "\n"),
    "one unbroken word": ("a.txt", lambda: ("a" * 10**6 for _ in range(300)), None),
    "blanks": ("a.txt", lambda: ["x", *(" " * 10**6 for _ in range(300)), "x"], None),
    "the longest row of .jsonl": ("a.jsonl", lambda: row('{"text": "', '"}\n'), None),
    "the longest row of .json": ("a.json", lambda: row('[{"text": "', '"}]\n'), None),
    "the longest row of .csv": ("a.csv", lambda: row('text\n"', '"\n'), None),
}
TINY = [str(number) for number in range(10**6)]


def peak_of_preparation(directory, paths, *options, code=0):
    """The peak of a preparation by one process, in MB."""
    base = ["a" * 2**power for power in range(1, 9)] + [" " * 2**power for power in range(1, 9)]
    tokenizer = train_tokenizer([WORDS * 9, *base * 3], TokenizerSection(path="x", vocab_size=300))
    save_tokenizer(tokenizer, directory / "tokenizer")
    command = [sys.executable, ROOT / "scripts" / "prepare_data.py", "--tokenizer.path=tokenizer"]
    command += ["--tokenizer.vocab_size=null", "--corpus.kind=files", f"--corpus.paths=[{paths}]"]
    command += ["--output_dir=shards", "--corpus.validation_fraction=0", "--num_workers=1", *options]
    peak = peak_anonymous_mb(command, directory=directory, code=code)
    print(paths, peak)
    return peak


@pytest.mark.trial
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc, which Linux has")
@pytest.mark.parametrize("case", LONG_TEXTS)
def test_no_text_takes_a_gigabyte(tmp_path, case):
    name, parts, separator = LONG_TEXTS[case]
    write_text(tmp_path / name, parts())
    options = [f"--corpus.document_separator={separator!r}".replace("'", "")] if separator else []
    assert peak_of_preparation(tmp_path, name, *options) < 1000
    index = load_index(tmp_path / "shards")
    assert index.total("train", "num_documents") == 1
    assert index.dropped == {}
    # Not a byte of the text is lost on the way.
    texts = (part for part in parts() if '"' not in part)
    assert index.total("train", "num_bytes") == sum(len(text.encode()) for text in texts)


@pytest.mark.trial
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc, which Linux has")
@pytest.mark.parametrize("form", ["lines", "table", "files"])
def test_a_million_tiny_documents_take_no_gigabyte(tmp_path, form):
    texts = TINY[:20_000] if form == "files" else TINY
    if form == "lines":
        write_text(tmp_path / "a.jsonl", (json.dumps({"text": text}) + "\n" for text in texts))
    elif form == "table":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    else:
        (tmp_path / "folder").mkdir()
        for text in texts:
            (tmp_path / "folder" / f"{text}.txt").write_text(text)
    paths = {"lines": "a.jsonl", "table": "a.parquet", "files": "folder"}[form]
    assert peak_of_preparation(tmp_path, paths) < 1000
    index = load_index(tmp_path / "shards")
    assert index.total("train", "num_documents") == len(texts)
    assert index.total("train", "num_bytes") == sum(map(len, texts))


@pytest.mark.trial
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc, which Linux has")
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.csv"])
def test_a_row_of_255_megabytes_is_refused_by_its_name_and_takes_no_gigabyte(tmp_path, name):
    before, after = ('text\n"', '"\n') if name == "a.csv" else ('{"text": "', '"}\n')
    write_text(tmp_path / name, [before, *("a" * 10**6 for _ in range(255)), after])
    assert peak_of_preparation(tmp_path, name, code=1) < 1000
    number = 2 if name == "a.csv" else 1
    assert f"error: {name}:{number} has more than {MAX_ROW_BYTES:,} bytes; cut it" in (tmp_path / "said").read_text()


@pytest.mark.trial
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc, which Linux has")
def test_a_tokenizer_is_trained_on_a_text_without_a_line_end_in_less_than_a_gigabyte(tmp_path):
    write_text(tmp_path / "a.txt", (WORDS * 1000 for _ in range(SIZE // len(WORDS) // 1000)))
    write_text(tmp_path / "b.txt", ("x" * 10**6 for _ in range(100)))
    command = [sys.executable, ROOT / "scripts" / "train_tokenizer.py", "--tokenizer.path=tokenizer"]
    command += ["--tokenizer.vocab_size=270", "--corpus.kind=files", "--corpus.paths=[a.txt, b.txt]"]
    peak = peak_anonymous_mb([*command, "--corpus.validation_fraction=0"], directory=tmp_path)
    print(peak)
    assert peak < 1000
