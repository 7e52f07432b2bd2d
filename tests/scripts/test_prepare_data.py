"""The two scripts that come before training: what they make, what they say, and how they refuse."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in tmp_path, in this process: its exit code, what it printed, and what it complained."""

    def run_script(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run_script


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Thirty small documents, as command line arguments."""
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"document {number} says that {number} times {number} is {number**2}")
    return ["--corpus.kind=files", f'--corpus.paths=["{tmp_path}/*.txt"]', "--corpus.validation_fraction=0.3"]


@pytest.fixture
def tokenizer() -> list[str]:
    return ["--tokenizer.path=tokenizer", "--tokenizer.vocab_size=280"]


def test_preparing_says_what_was_made_and_how_to_go_on(run, tmp_path, corpus, tokenizer):
    code, printed, complaints = run("prepare_data.py", *corpus, *tokenizer, "--output_dir=shards")
    assert (code, complaints) == (0, "")
    assert (tmp_path / "shards" / "index.json").is_file()
    assert printed.startswith("train: ")
    assert printed.endswith("python scripts/pretrain.py --data.path shards\n")


def test_a_tokenizer_trained_first_is_the_one_that_preparing_uses(run, tmp_path, corpus, tokenizer):
    _, printed, _ = run("train_tokenizer.py", *corpus, *tokenizer)
    assert printed.startswith("tokenizer of 280 ids: tokenizer\n")
    saved = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    *_, command = printed.strip().split("\n")[1].partition("scripts/")
    script, *arguments = command.replace("DIRECTORY", "shards").split()
    assert run(script, *corpus, *arguments)[0] == 0
    assert (tmp_path / "shards" / "tokenizer" / "tokenizer.json").read_bytes() == saved


@pytest.mark.parametrize("script", ["prepare_data.py", "train_tokenizer.py"])
def test_a_users_mistake_is_one_line_and_exit_code_1(run, script, tokenizer):
    output_dir = ["--output_dir=shards"] if script == "prepare_data.py" else []
    paths = ["--corpus.kind=files", '--corpus.paths=["none.txt"]']
    expected = "error: corpus.paths: 'none.txt' matches no file; correct the path, or quote the pattern.\n"
    assert run(script, *paths, *tokenizer, *output_dir) == (1, "", expected)


@pytest.mark.parametrize("script", ["prepare_data.py", "train_tokenizer.py"])
@pytest.mark.parametrize("arguments", [["--help"], ["--tokenizer.vocab_sise=9"]])
def test_help_and_mistakes_in_a_recipe_are_answered_before_anything_heavy_is_imported(tmp_path, script, arguments):
    code = (
        "import atexit, runpy, sys;"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules))));"
        f"sys.argv = {[script, *arguments]!r};"
        f"runpy.run_path({str(ROOT / 'scripts' / script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")
    assert done.returncode == (0 if arguments == ["--help"] else 2)


def test_the_default_recipe_is_found_from_any_directory(run):
    code, _, complaint = run("prepare_data.py", "--tokens_per_shard=0")
    assert code == 2
    assert "tokens_per_shard (0) must be positive" in complaint
