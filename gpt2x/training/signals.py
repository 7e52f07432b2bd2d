"""Ctrl-C, SIGTERM, SIGUSR1 and a lost launcher: finish the step, save, leave; or save and go on."""

import os
import signal
import sys
from types import FrameType

from gpt2x.terminal import write_at_once


class StopRequest:
    """Remembers what signals ask of this process.

    Use as a context manager around the whole process: the handlers that were there before are put back at its end.
    While there is nothing to save, SIGINT and SIGTERM end the process at once, in one line. Between ``hold`` and
    ``let_go`` they are remembered, and the training loop, which asks by ``is_asked``, saves and leaves; a second one
    ends the process at once. SIGUSR1 asks to save and to go on.

    Attributes:
        signal_number: the signal that asked to stop, None while nobody has.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, *, watches_parent: bool = False) -> None:
        """Watches nothing yet.

        Args:
            watches_parent: whether the parent is a launcher, whose death asks to stop as SIGTERM does: the launcher
                of a single process dies of a SIGTERM without handing it on.
        """
        self.signal_number: int | None = None
        self._parent = os.getppid() if watches_parent else None
        self._is_held = self._wants_save = False
        self._previous: dict[int, signal.Handlers | object] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def hold(self) -> None:
        """From now on something would be lost, so a signal is remembered."""
        self._is_held = True

    def let_go(self) -> None:
        """From now on nothing would be lost, so a signal ends the process."""
        self._is_held = False

    def is_asked(self) -> bool:
        """Whether this process was asked to stop, or its launcher has died."""
        if self.signal_number is None and self._parent is not None and os.getppid() != self._parent:
            self.signal_number = signal.SIGTERM
            _say("the launcher is gone: saving after this step.")
        return self.signal_number is not None

    def takes_save_request(self) -> bool:
        """Whether SIGUSR1 asked to save since this was last called."""
        wants_save, self._wants_save = self._wants_save, False
        return wants_save

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that stopped for this signal; 0 where nobody asked."""
        return 0 if self.signal_number is None else 128 + self.signal_number

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            self._wants_save = True
            _say(f"{name}: saving after this step, and going on.")
        elif self.signal_number is not None:
            os._exit(128 + number)  # without waiting for threads that write
        else:
            self.signal_number = number
            if not self._is_held:
                _say(f"{name}: nothing to save, leaving.")
                sys.exit(128 + number)
            _say(f"{name}: saving after this step; once more to leave at once.")


def _say(text: str) -> None:
    """Past Python's buffers, into which the interrupted code may be writing."""
    write_at_once(2, text)
