"""The filler as a process: it survives its own death, and never its parent's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from naive_stream import LENGTH, SEED, read

from gpt2x.errors import UserError

ROOT = Path(__file__).parents[2]

# A run that reads a stream until it is killed.
RUN = """
import json, sys, time
from pathlib import Path
from gpt2x.batches.stream import StreamSource
from gpt2x.config import CorpusSection, StreamSection
section = json.loads(sys.argv[1])
section["corpus"], section["cache_dir"] = CorpusSection(**section["corpus"]), Path(section["cache_dir"])
source = StreamSource(StreamSection(**section), int(sys.argv[2]), seed=int(sys.argv[3]), name="web")
source.require(1)
print(source.cache.filler.process.pid, flush=True)
time.sleep(600)
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def ends_soon(pid):
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


@pytest.mark.trial
def test_a_killed_filler_is_started_again_and_one_that_dies_again_at_once_is_reported(section, open_source, naive):
    source = open_source()
    parts = [read(source, 0, 8)]
    first = source.cache.filler.process.pid
    # Neither a Ctrl-C nor a cluster's SIGTERM ends it: the training still needs it.
    os.kill(first, signal.SIGINT)
    os.kill(first, signal.SIGTERM)
    source.require(9)
    assert is_running(first)
    os.kill(first, signal.SIGKILL)
    assert ends_soon(first)
    for part in ("tokenizer", "train"):
        shutil.rmtree(section.cache_dir / part)
    parts.append(read(source, 8, 96))
    assert np.array_equal(np.concatenate(parts), naive.sequences(0, 96))
    second = source.cache.filler.process.pid
    assert second != first
    os.kill(second, signal.SIGKILL)
    assert ends_soon(second)
    expected = r"the filler of stream 'web' ended twice \(status -9\); its last words: .*cache/filler.log has the rest"
    with pytest.raises(UserError, match=expected):
        read(source, 96, naive.num_draws)
    source.close()


def test_a_killed_parent_leaves_no_orphan_and_its_cache_can_be_used_at_once(section, open_source, naive):
    recipe = json.dumps(asdict(section), default=str)
    command = [sys.executable, "-c", RUN, recipe, str(LENGTH), str(SEED)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        filler = int(parent.stdout.readline())
        assert is_running(filler)
        parent.kill()
    assert np.array_equal(read(open_source(), 0, 24), naive.sequences(0, 24))
    assert ends_soon(filler)


def test_a_cache_belongs_to_one_run_until_it_is_closed(section, open_source):
    first = open_source()
    pid = first.cache.filler.process.pid
    with pytest.raises(UserError, match=r"stream.cache_dir '.*cache' is used by another run \(process \d+ on "):
        open_source()
    first.close()
    assert not is_running(pid)
    open_source()


def test_the_filler_imports_neither_torch_nor_transformers():
    code = "import sys, gpt2x.streams.filler; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"
