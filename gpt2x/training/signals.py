"""Ctrl-C and SIGTERM: finish the step, save, leave."""

import signal
import sys
from types import FrameType


class StopRequest:
    """Remembers that the process was asked to stop; a second request ends it at once.

    Use as a context manager around the training: the handlers that were there before are put back at its end.

    Attributes:
        signal_number: the signal that asked, None while nobody has.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, signal.Handlers | object] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None:
            sys.exit(128 + number)
        self.signal_number = number
        print(f"\n{signal.Signals(number).name}: saving after this step; once more to leave at once.", file=sys.stderr)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that stopped for this signal; 0 where nobody asked."""
        return 0 if self.signal_number is None else 128 + self.signal_number
