"""The script that turns token files of another project into shards: what it makes, says and refuses."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2x.config import TokenizerSection
from gpt2x.shards.index import load_index
from gpt2x.tokenizers.bpe import save_tokenizer, train_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "import_tokens.py"


@pytest.fixture
def arguments(tmp_path, monkeypatch) -> list[str]:
    """Forty documents of nanoGPT and their tokenizer, whose end of text is 0."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    save_tokenizer(
        train_tokenizer(["a few words"], TokenizerSection(path="t", vocab_size=257)), tmp_path / "tokenizer"
    )
    ids = [number for document in range(40) for number in (document + 1, document + 2, 0)]
    np.array(ids, np.uint16).tofile(tmp_path / "train.bin")
    return ["--path=train.bin", "--tokenizer=tokenizer", "--validation_fraction=0.3", "--output_dir=shards"]


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


def test_importing_says_what_was_made_and_how_to_go_on(tmp_path, arguments):
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_index(tmp_path / "shards").total("train", "num_tokens") % 3 == 0
    assert done.stdout.startswith("train: ")
    assert done.stdout.endswith("scripts/pretrain.py --data.path shards\n")


@pytest.mark.trial
def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path, arguments):
    (tmp_path / "train.bin").write_bytes(b"abc" * 21)
    done = run(tmp_path, *arguments)
    expected = "error: train.bin: its 63 bytes are not a whole number of ids of 2 bytes; copy it again, or give the "
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{expected}tokenizer that made it.\n"


@pytest.mark.parametrize("argument", ["--help", "--tokenizr=x"])
def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(tmp_path, argument):
    code = (
        "import atexit, runpy, sys;"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'pyarrow'} & set(sys.modules))));"
        f"sys.argv = ['import_tokens.py', {argument!r}];"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")
    assert done.returncode == (0 if argument == "--help" else 2)
