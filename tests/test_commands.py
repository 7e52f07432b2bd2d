"""Printed commands: pasted into a shell they run, wherever it stands and whatever its PATH is."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2x import commands
from gpt2x.commands import install_extra, shell_command, tool

ROOT = Path(__file__).parents[1]


def in_a_shell(command, *, path="/usr/bin:/bin", cwd):
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=cwd, env=environment)


def make_environment(directory):
    """An environment as far as a shell sees it: a folder of links to this interpreter and a program of a library."""
    programs = directory / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "python3"):
        (programs / name).symlink_to(sys.executable)
    (programs / "hf").write_text("#!/bin/sh\n")
    (programs / "hf").chmod(0o755)
    return programs


def test_a_printed_command_runs_outside_the_environment_and_away_from_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = shell_command("generate", tmp_path / "a run's", "--max_new_tokens", "0")
    finished = in_a_shell(command, cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("generate.py: error: max_new_tokens (0) must be ")


@pytest.mark.parametrize("name", ["python", "python3"])
def test_an_environment_below_the_working_directory_is_named_as_seen_from_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(make_environment(tmp_path) / name))
    monkeypatch.setattr(commands, "_ROOT", tmp_path)
    assert shell_command("export", "runs/x") == f".venv/bin/{name} scripts/export.py runs/x"
    assert install_extra("gguf") == f".venv/bin/{name} -m pip install -e '.[gguf]'"
    assert tool("hf", "auth", "login") == ".venv/bin/hf auth login"
    assert in_a_shell(tool("hf", "auth", "login"), cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("name", ["python", "python3"])
def test_in_an_environment_that_is_active_the_bare_names_are_enough(tmp_path, monkeypatch, name):
    programs = make_environment(tmp_path)
    monkeypatch.setattr(sys, "executable", str(programs / name))
    monkeypatch.setattr(commands, "_ROOT", tmp_path)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    assert shell_command("export", "runs/x") == "python scripts/export.py runs/x"
    assert tool("hf", "auth", "login") == "hf auth login"


def test_a_python_that_is_another_one_is_not_meant(tmp_path, monkeypatch):
    """The system's own, to which the environment's links lead as well, has none of the libraries."""
    programs, others = make_environment(tmp_path), make_environment(tmp_path / "others")
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", f"{others}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    assert shlex.split(shell_command("export"))[0] == ".venv/bin/python"
