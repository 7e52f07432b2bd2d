"""Exports appear whole or not at all, whatever ends the process that writes them."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2x.errors import UserError
from gpt2x.publishing.files import size_bytes, whole_or_nothing

ROOT = Path(__file__).parents[2]


def test_a_finished_export_is_there_and_nothing_beside_it(tmp_path):
    with whole_or_nothing(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert size_bytes(tmp_path / "out") == 2


def test_a_failed_export_leaves_nothing(tmp_path):
    with contextlib.suppress(UserError), whole_or_nothing(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
        raise UserError("it computes something else")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_model_and_the_next_one_succeeds(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from gpt2x.publishing.files import whole_or_nothing\n"
        "with whole_or_nothing(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], cwd=ROOT)
    assert killed.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with whole_or_nothing(tmp_path / "out") as partial:
        (partial / "whole").write_text("whole")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/whole"]


def test_another_precision_joins_the_first(tmp_path):
    for name in ("model.onnx", "model_fp16.onnx"):
        with whole_or_nothing(tmp_path / "out") as partial:
            (partial / "onnx").mkdir()
            (partial / "onnx" / name).write_text(name)
            (partial / "config.json").write_text(name)
    assert sorted(path.name for path in (tmp_path / "out" / "onnx").iterdir()) == ["model.onnx", "model_fp16.onnx"]
    assert (tmp_path / "out" / "config.json").read_text() == "model_fp16.onnx"


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    message = r"output \(.*out\) must be a directory, but is a file; give another by --output"
    with pytest.raises(UserError, match=message), whole_or_nothing(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "mine"
