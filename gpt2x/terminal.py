"""What every script runs in: standard streams that end nothing, and ends of one line."""

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from zlib import crc32

from typing_extensions import Buffer

from gpt2x.errors import UserError, exit_on_user_error

# Of these a write that comes later may know nothing: a disk has room again.
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StandardStream(io.RawIOBase):
    """A descriptor that people read; writing to it never fails, since work that takes hours must not end with a
    terminal, the program behind a pipe, or the disk of a log.

    The first failure is told on the other standard stream. What a full disk has no room for is left out. A descriptor
    that nobody reads any more becomes the null device, also for processes that are started later.
    """

    def __init__(self, descriptor: int, name: str, *, teller: int, is_product: bool = False) -> None:
        """Writes nothing yet.

        Args:
            descriptor: where to write.
            name: of the stream, in what is told.
            teller: the descriptor on which a failure is told.
            is_product: whether the work is done for what is written here: then a reader that goes away ends the
                process by SIGPIPE, and what else fails is a UserError.
        """
        self.name = f"<{name}>"
        self._descriptor, self._teller, self._is_product = descriptor, teller, is_product
        self._has_told = False

    def writable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal that is still there."""
        return os.isatty(self._descriptor)

    def write(self, data: Buffer, /) -> int:
        """Writes what can be written; the number of bytes that need not be written again."""
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another program has made the terminal that we share non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                self._give_way(error)
                return memoryview(data).nbytes

    def _give_way(self, error: OSError) -> None:
        """Goes on without the stream, or without what there is no room for."""
        if self._is_product and error.errno == errno.EPIPE:  # as the tools of a shell do
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
        if error.errno not in _PASSING:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._descriptor)
            os.close(null)
        if self._has_told:
            return
        self._has_told = True
        reason = f"{self.name.strip('<>')} cannot be written to ({error.strerror})"
        if self._is_product:
            raise UserError(f"{reason}; give it another place.")
        write_at_once(self._teller, f"{reason}; going on without it.")


def write_at_once(descriptor: int, text: str) -> None:
    """Writes a line past Python's buffers, into which other code may just be writing; where nobody is, to nobody."""
    with suppress(OSError):
        os.write(descriptor, f"\n{text}\n".encode(errors="backslashreplace"))


def protect_streams(*, is_product: bool = False) -> None:
    """Makes standard output and error such that no write to them fails: for want of a reader, room or a character.

    Characters that their encoding lacks are written as escapes. Lines are written when they end, so that output and
    error stay in order where both go to one file. A stream that was closed becomes the null device: a file that gets
    its number would else take in what libraries complain about.

    Args:
        is_product: whether the script works for what it prints.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
    if "stdin" in closed:
        sys.stdin = open(null, encoding="utf-8", closefd=False)  # noqa: SIM115
    elif isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # where it was read from before
            sys.stdin.reconfigure(errors="replace")
    descriptors = {"stdout": 1, "stderr": 2} | dict.fromkeys(closed, null)
    for name, other in (("stdout", "stderr"), ("stderr", "stdout")):
        stream = getattr(sys, name)
        if stream is not None:
            stream.flush()
        raw = StandardStream(
            descriptors[name], name, teller=descriptors[other], is_product=is_product and name == "stdout"
        )
        text = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding="utf-8" if stream is None else stream.encoding,
            errors="backslashreplace",
            line_buffering=True,
            write_through=stream is not None and stream.write_through,
        )
        setattr(sys, name, text)


@contextmanager
def command(
    environment: Mapping[str, str] | None = None, *, if_stopped: str = "stopped", is_product: bool = False
) -> Iterator[None]:
    """Runs a script: its streams are protected, a user's mistake and Ctrl-C are one line.

    Args:
        environment: of one of several processes of a launcher, which say the same but once.
        if_stopped: what Ctrl-C has done.
        is_product: whether the script works for what it prints; it ends where nobody reads that any more.
    """
    protect_streams(is_product=is_product)
    try:
        with exit_on_user_error(is_said=lambda text: is_said_by_another(text, environment or {})):
            yield
    except KeyboardInterrupt:
        print(f"\n{if_stopped}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def is_said_by_another(text: str, environment: Mapping[str, str]) -> bool:
    """Whether another process of the same launcher has said this, and needs no echo.

    torchrun gives each process a file for its errors, in a directory of the start that they share.
    """
    file = environment.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    try:
        (Path(file).parents[1] / f"said-{crc32(text.encode(errors='backslashreplace'))}").touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def one_voice(environment: Mapping[str, str]) -> Iterator[None]:
    """Has the processes of a launcher, which all say the same in the block, say it once.

    The first to complain speaks, since its end is that of the others; what ends none is printed by the first of each
    machine.
    """
    is_first, complaint = environment.get("LOCAL_RANK", "0") == "0", io.StringIO()
    try:
        with redirect_stderr(complaint), redirect_stdout(sys.stdout if is_first else io.StringIO()):
            yield
    finally:
        text = complaint.getvalue()
        if text and not is_said_by_another(text, environment):
            sys.stderr.write(text)
