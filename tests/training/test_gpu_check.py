"""tests/trials/gpu_check.py, whose time is a GPU's, keeps up with the code: on the CPU, in small shapes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[1] / "trials" / "gpu_check.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


@pytest.mark.trial
def test_every_section_of_the_check_for_a_gpu_runs_and_is_right_on_the_cpu(script, tmp_path, capsys):
    with torch.compiler.set_stance("force_eager"):  # compiling is what takes long; test_gpu.py has a trial of it
        status = script.main([str(tmp_path), "--smoke"])
    assert (status, capsys.readouterr().out.splitlines()[-1]) == (0, "ok")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["shards fp16"]["loss"] < 2e-5
    expected = {"versions", "loss", "step", "host", "evaluation", "batches", "attention", "random", "newton-schulz"}
    expected |= {"shards", "train", "generate"}
    assert {name.split()[0].strip(",") for name in facts} == expected


def test_a_section_that_fails_costs_no_other_and_is_told(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(script.SECTIONS, "muon", lambda _check: 1 / 0)
    assert script.main([str(tmp_path), "--smoke", "--sections", "muon", "copies"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "not ok: muon failed"
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert "ZeroDivisionError" in facts["muon failed"]["error"]
    assert facts["host copies"]["ok"]


def test_a_section_that_there_is_not_is_refused(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), "--sections", "speeed"])
    assert "invalid choice: 'speeed' (choose from" in capsys.readouterr().err
