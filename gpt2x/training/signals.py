"""Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and a lost launcher: finish the step, save, leave; or save and go on.

Python runs a signal's handler when the main thread is back in its bytecode. One that waits in C++, for another rank or
a compiler, is not; so a thread hears the signals too, by the pipe into which the interpreter writes their numbers.
Whoever reads a number first, the handler or the thread, does what it asks for.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from types import FrameType

from gpt2x.terminal import write_at_once

# How long the main thread may take to leave by itself, cleaning up; where it waits in C++ it never does.
LEAVE_S = 10.0
# How often it is looked whether the launcher lives.
LOOK_S = 0.2


class StopRequest:
    """Remembers what signals ask of this process.

    Use as a context manager around the whole process, in its main thread: the handlers that were there before are put
    back at its end. While there is nothing to save, SIGINT, SIGTERM and SIGHUP end the process in one line: by
    SystemExit, or, where the main thread does not hear, after LEAVE_S. Between ``hold`` and ``let_go`` they are
    remembered, and the training loop, which asks by ``is_asked``, saves and leaves; a second one ends the process at
    once, whatever the main thread waits for. A second SIGHUP does not: a terminal that is closed sends two. A SIGHUP
    that was ignored from the start, as nohup has it, stays so. SIGUSR1 asks to save and to go on.

    Attributes:
        signal_number: the signal that asked to stop, None while nobody has.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, *, watches_parent: bool = False) -> None:
        """Watches nothing yet.

        Args:
            watches_parent: whether the parent is a launcher, whose death asks to stop as SIGTERM does: the launcher
                of a single process dies of a SIGTERM without handing it on.
        """
        self.signal_number: int | None = None
        self._parent = os.getppid() if watches_parent else None
        self._is_held = self._wants_save = self._must_raise = False
        self._previous: dict[int, signal.Handlers | object] = {}
        # Of the main thread, whose handler may interrupt itself, and of the one that listens.
        self._lock = threading.RLock()
        self._leave_until: float | None = None
        self._ended = threading.Event()

    def __enter__(self) -> "StopRequest":
        self._main_thread = threading.get_ident()
        self._reading, self._writing = os.pipe()
        for end in (self._reading, self._writing):
            os.set_blocking(end, False)
        self._previous_pipe = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [number for number in self.SIGNALS if not (number == signal.SIGHUP and is_nohup)]
        self._previous = {number: signal.signal(number, self._handle) for number in heard}
        os.register_at_fork(after_in_child=self._let_child_be)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._leave_until is not None and kind is SystemExit:
            # All is cleaned up; what the interpreter still does, as waiting for threads that talk to other processes,
            # may take for ever.
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(self.exit_code)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
        signal.set_wakeup_fd(self._previous_pipe)
        self._ended.set()
        os.write(self._writing, b"\0")  # which ends the wait of the thread
        self._listener.join()
        os.close(self._reading)
        os.close(self._writing)

    def hold(self) -> None:
        """From now on something would be lost, so a signal is remembered."""
        self._is_held = True

    def let_go(self) -> None:
        """From now on nothing would be lost, so a signal ends the process."""
        self._is_held = False

    def is_asked(self) -> bool:
        """Whether this process was asked to stop, or its launcher has died."""
        return self.signal_number is not None

    def take_save_request(self) -> bool:
        """Takes back the request to save that SIGUSR1 made; False where there was none."""
        wants_save, self._wants_save = self._wants_save, False
        return wants_save

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that stopped for this signal; 0 where nobody asked."""
        return 0 if self.signal_number is None else 128 + self.signal_number

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        """The handler, in the main thread."""
        with self._lock:
            self._hear()
            must_raise, self._must_raise = self._must_raise, False
        if must_raise:
            sys.exit(self.exit_code)

    def _listen(self) -> None:
        """The whole life of the thread that listens."""
        while not self._ended.is_set():
            if select.select([self._reading], [], [], LOOK_S)[0]:
                self._hear()
            self._look_for_parent()
            if self._leave_until is not None and time.monotonic() > self._leave_until:
                os._exit(self.exit_code)

    def _hear(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):  # the other one was first
            for number in os.read(self._reading, 1024):
                if number in self._previous:  # not the clock of somebody else
                    self._take(number)

    def _take(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            if self._leave_until is None:
                self._wants_save = True
                _say(f"{name}: saving after this step, and going on.")
        elif self.signal_number is None:
            self.signal_number = number
            if self._is_held:
                _say(f"{name}: saving after this step; once more to leave at once.")
            else:
                self._must_raise, self._leave_until = True, time.monotonic() + LEAVE_S
                _say(f"{name}: nothing to save, leaving.")
                if threading.get_ident() != self._main_thread:
                    # It may wait in the kernel, which gave the signal to another thread.
                    signal.pthread_kill(self._main_thread, signal.SIGUSR1)
        elif number != signal.SIGHUP:
            os._exit(128 + number)  # without waiting for threads that write

    def _look_for_parent(self) -> None:
        with self._lock:
            if self._parent is None or os.getppid() == self._parent:
                return
            self._parent = None
            self._hear()  # what has ended the launcher may have been sent to this process as well
            if self.signal_number is None:
                _say("the launcher is gone.")
                os.kill(os.getpid(), signal.SIGTERM)  # heard as if it had been handed on

    def _let_child_be(self) -> None:
        """A forked child dies of its signals, and must not write their numbers into the pipe of its parent."""
        if self._previous:
            signal.set_wakeup_fd(-1)
            for number in self._previous:
                signal.signal(number, signal.SIG_DFL)


def _say(text: str) -> None:
    """Past Python's buffers, into which the interrupted code may be writing."""
    write_at_once(2, text)
