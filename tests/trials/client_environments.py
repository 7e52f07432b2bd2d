"""Libraries of other clients, installed from the registries once and kept in .venv-clients/, without gpt2x in them."""

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-clients"
# What pip and npm say where they reach no registry; anything else that goes wrong is a failure.
_UNREACHABLE = re.compile(
    r"NewConnectionError|ConnectTimeoutError|ReadTimeoutError|NameResolutionError|ProxyError"
    r"|ENOTFOUND|ECONNREFUSED|ECONNRESET|EAI_AGAIN|ETIMEDOUT|ENETUNREACH"
)
_LLAMA_CPP_BINARIES = {
    ("Linux", "x86_64"): "linux-x64",
    ("Linux", "aarch64"): "linux-arm64",
    ("Darwin", "arm64"): "mac-arm64-metal",
    ("Darwin", "x86_64"): "mac-x64",
}


def pinned(name: str) -> str:
    """The tested version of a library, as constraints.txt has it: NAME==VERSION."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def python_with(*requirements: str) -> Path:
    """The interpreter of an environment of its own, named by its first requirement."""
    directory = ENVIRONMENTS / _name(requirements[0])
    python = directory / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _make_once(directory, requirements, [[sys.executable, "-m", "venv", directory], [*pip, *requirements]])
    return python


def packages_with(*requirements: str) -> Path:
    """A directory of packages for PYTHONPATH: several versions of a library beside one installation of torch."""
    directory = ENVIRONMENTS / _name(requirements[0])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _make_once(directory, requirements, [[*pip, "--upgrade", "--target", directory, *requirements]])
    return directory


def node_modules_with(*packages: str) -> Path:
    """The node_modules/ of a directory of its own; nothing that the packages bring is executed."""
    if shutil.which("npm") is None:
        pytest.skip("needs Node, which is not installed")
    directory = ENVIRONMENTS / _name(packages[0])
    _make_once(directory, packages, [["npm", "install", "--ignore-scripts", "--prefix", directory, *packages]])
    return directory / "node_modules"


def llama_cpp_packages(version: str) -> list[str]:
    """node-llama-cpp and its binary for this machine; left to itself npm takes those for CUDA too, a gigabyte."""
    binary = _LLAMA_CPP_BINARIES.get((platform.system(), platform.machine()))
    if binary is None:
        pytest.skip(f"node-llama-cpp has no binary for {platform.system()} {platform.machine()}")
    return [f"node-llama-cpp@{version}", f"@node-llama-cpp/{binary}@{version}", "--omit=optional"]


def _name(requirement: str) -> str:
    return re.sub(r"[^\w.]+", "-", requirement).strip("-.")


def _make_once(directory: Path, requirements: Sequence[str], commands: list[list]) -> None:
    """Runs the commands unless they have succeeded for the same requirements before; the stamp is written last."""
    stamp, wanted = directory / "installed.json", json.dumps(requirements)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    directory.mkdir(parents=True, exist_ok=True)
    for command in commands:
        finished = subprocess.run(command, capture_output=True, text=True)
        said = finished.stdout + finished.stderr
        if finished.returncode and _UNREACHABLE.search(said):
            pytest.skip(f"the registry that has {requirements[0]} cannot be reached")
        assert finished.returncode == 0, said
    stamp.write_text(wanted)
