"""A preparation that is killed, stopped or given ten times as much text, through its script."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gpt2x.config import TokenizerSection
from gpt2x.tokenizers.bpe import save_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = ["def", "return", "(", ")", ":", "\n", "self", "value", "=", "1", "naïve", "if", "\n\n    "]
MEGABYTE = 1_000_000


def write_corpus(directory: Path, *, num_files: int, megabytes: float) -> None:
    directory.mkdir()
    for number in range(num_files):
        generator, size = random.Random(number), 0
        with (directory / f"{number}.jsonl").open("w") as file:
            while size < megabytes * MEGABYTE / num_files:
                text = " ".join(generator.choices(WORDS, k=generator.randrange(1, 3000)))
                size += file.write(json.dumps({"text": text}) + "\n")


def command(directory: Path, corpus: Path, output: str, *overrides: str) -> list[str]:
    """The script with a tokenizer that is trained once."""
    tokenizer = directory / "tokenizer"
    if not tokenizer.exists():
        section = TokenizerSection(path=str(tokenizer), vocab_size=280)
        save_tokenizer(train_tokenizer([" ".join(WORDS) * 9], section), tokenizer)
    script = [sys.executable, str(ROOT / "scripts" / "prepare_data.py")]
    files = ["--corpus.kind=files", f'--corpus.paths=["{corpus}"]']
    where = [f"--tokenizer.path={tokenizer}", "--tokenizer.vocab_size=null", f"--output_dir={directory / output}"]
    return [*script, *files, *where, *overrides]


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def end(process: subprocess.Popen) -> None:
    """Kills the script and waits for its workers, which end once they notice."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(family, timeout=60)[1]


@pytest.mark.trial
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_preparation_killed_five_times_ends_in_the_same_bytes(tmp_path, num_workers):
    write_corpus(tmp_path / "corpus", num_files=4, megabytes=12)
    overrides = ["--num_tasks=4", f"--num_workers={num_workers}", "--tokens_per_shard=200000"]
    expected = command(tmp_path, tmp_path / "corpus", "expected", *overrides)
    started = time.monotonic()
    subprocess.run(expected, check=True, capture_output=True)
    duration, generator = time.monotonic() - started, random.Random(num_workers)
    kills = 0
    while kills < 5:
        process = subprocess.Popen(
            command(tmp_path, tmp_path / "corpus", "killed", *overrides),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Not in the seconds of imports, which leave nothing behind.
        while not (tmp_path / "killed").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, duration / 3 if kills else 0.5))
        if process.poll() is not None:
            assert process.communicate()[1] == ""
            assert process.returncode == 0
            (tmp_path / "killed" / "index.json").unlink()  # it was quicker: as if killed before its last step
        else:
            end(process)
        kills += 1
    subprocess.run(command(tmp_path, tmp_path / "corpus", "killed", *overrides), check=True, capture_output=True)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "expected")
    assert len(hashes(tmp_path / "killed")) > 20


@pytest.fixture
def started(tmp_path):
    """The script at work in two processes, on documents that keep them busy for long."""
    write_corpus(tmp_path / "corpus", num_files=4, megabytes=60)
    process = subprocess.Popen(
        command(tmp_path, tmp_path / "corpus", "shards", "--num_tasks=4", "--num_workers=2"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(list((tmp_path / "shards").glob("*/"))) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    yield process
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stderr.close()


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.trial
def test_ctrl_c_ends_all_processes_without_a_traceback(started):
    workers = workers_of(started)
    assert len(workers) == 2
    os.killpg(started.pid, signal.SIGINT)
    _, complaints = started.communicate(timeout=30)
    assert started.returncode == 130
    assert complaints.strip() == "stopped; the same command goes on with the tasks that are not finished"
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.trial
def test_workers_whose_parent_is_killed_end_by_themselves_and_quietly(started):
    workers = workers_of(started)
    started.kill()
    assert not psutil.wait_procs(workers, timeout=30)[1]
    _, complaints = started.communicate(timeout=30)
    assert "Traceback" not in complaints


@pytest.mark.trial
def test_a_killed_worker_is_named_in_one_line(started):
    worker = workers_of(started)[0]
    worker.kill()
    _, complaints = started.communicate(timeout=30)
    assert started.returncode == 1
    assert len(complaints.splitlines()) == 1
    assert f"(process {worker.pid}) was killed by SIGKILL" in complaints


def peak_anonymous_megabytes(arguments: list[str]) -> float:
    """The highest RssAnon of a script and its children, from /proc."""
    process, peak = psutil.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE), 0
    while process.poll() is None:
        used = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
            except OSError:
                continue
            used += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        peak = max(peak, used)
        time.sleep(0.02)
    assert process.returncode == 0, process.stderr.read()
    process.stderr.close()
    return peak / 1024


@pytest.mark.trial
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_ten_times_the_text_takes_no_more_memory(tmp_path, kind):
    peaks = []
    for megabytes in (6, 60):
        corpus = tmp_path / str(megabytes)
        write_corpus(corpus, num_files=1, megabytes=megabytes)
        file = corpus / f"0.{kind}"
        if kind == "txt":  # one document, longer than is held in memory
            lines = (corpus / "0.jsonl").read_text().splitlines()
            file.write_text("\n".join(f"line\n{json.loads(line)['text']}" for line in lines))
            if megabytes == 6:
                assert file.stat().st_size < 8 * MEGABYTE
        overrides = ["--corpus.validation_fraction=0", "--tokens_per_shard=100000000"]
        peaks.append(peak_anonymous_megabytes(command(tmp_path, file, f"shards_{megabytes}", *overrides)))
    assert peaks[1] - peaks[0] < 50
