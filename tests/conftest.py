"""Every test is offline, on few threads, and warned when it reaches for the network all the same.

GPT2X_TEST_DATA names a folder of published data that a few tests are compared with (published_data.py).
"""

import atexit
import os
import shutil
import signal
import socket
import tempfile
from typing import Any

import pytest

# Read by the libraries when they are imported, hence before any of them is; subprocesses of tests inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="gpt2x-tests-")
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models of tests are so small that more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# Under nohup it is ignored, and would be by every process that a test starts; what is handled is their own again.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)

LOOPBACK = ("localhost", "127.", "::1")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test whose Python code connects to another machine; loopback and Unix sockets stay open."""
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _only_to_this_machine(getattr(socket.socket, name)))


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process says once, it says once in every test."""
    from gpt2x import locate

    monkeypatch.setattr(locate, "_said", set())


def _only_to_this_machine(connect: Any) -> Any:
    def guarded(connecting: socket.socket, address: Any) -> Any:
        if connecting.family != socket.AF_UNIX and not str(address[0]).startswith(LOOPBACK):
            pytest.fail(f"the test connects to {address}; tests are offline, so make what it needs in tmp_path.")
        return connect(connecting, address)

    return guarded
