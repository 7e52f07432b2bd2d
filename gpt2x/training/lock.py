"""One writer per run directory."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gpt2x.errors import UserError

LOCK_FILE = "run.lock"
_TAKE_OVER = " Whether that process still lives cannot be known here: if it is dead, --run.force_lock true."


@contextmanager
def locked(run_dir: Path, *, is_forced: bool = False) -> Iterator[None]:
    """Has a run directory to itself while the block runs.

    The lock is the kernel's (flock), so on one machine it is atomic, and free as soon as its owner is dead, however
    it died. The file says who owns it; of an owner on another machine nothing else is known.

    Args:
        run_dir: made where it is missing.
        is_forced: whether a lock of another machine is taken over.

    Raises:
        UserError: where another process has it, and where the directory cannot be written to.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = _open_locked(run_dir / LOCK_FILE)
        if file is None:
            raise UserError(_refusal(run_dir))
        owner = _owner(run_dir)
        if owner is not None and owner["host"] != socket.gethostname() and not is_forced:
            file.close()
            raise UserError(_refusal(run_dir) + _TAKE_OVER)
        _write_owner(file)
    except OSError as error:
        raise UserError(
            f"{run_dir} cannot be written to ({error.strerror}); make it writable, or set run.dir."
        ) from error
    try:
        yield
    finally:
        (run_dir / LOCK_FILE).unlink(missing_ok=True)  # before it is free, so that nobody waits for a deleted file
        file.close()


def _open_locked(path: Path) -> IO[bytes] | None:
    """The file, locked; None where another process of this machine has it."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its owner has deleted it since it was opened


def _owner(run_dir: Path) -> dict[str, Any] | None:
    """Who wrote the file; None where nobody has, or has come to the end of it."""
    try:
        owner = json.loads((run_dir / LOCK_FILE).read_bytes())
        return {name: owner[name] for name in ("pid", "host", "since")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write_owner(file: IO[bytes]) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    file.truncate(0)
    file.write(json.dumps(owner).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _refusal(run_dir: Path) -> str:
    deadline = time.monotonic() + 1.0
    while (owner := _owner(run_dir)) is None and time.monotonic() < deadline:
        time.sleep(0.02)  # locked, but not yet written
    who = "another process" if owner is None else "process {pid} on {host} since {since}".format(**owner)
    return f"{run_dir} is being written by {who}; wait for it, or start another run with --run.name NAME."
