"""The filler process: `python -m gpt2x.streams`, started by gpt2x.streams.process."""

import signal
import sys
from typing import TextIO

from gpt2x.addresses import without_secrets
from gpt2x.terminal import protect_streams


class Discreet:
    """Standard error, which goes into a file: what libraries and tracebacks say of addresses is without secrets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text as `without_secrets` gives it."""
        return self._stream.write(without_secrets(text))

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


protect_streams()
sys.stderr = Discreet(sys.stderr)
# Before the imports, which take seconds: a Ctrl-C, a lost terminal's SIGHUP or a cluster's SIGTERM goes to the whole
# group of processes, and the training, which still needs the filler while it saves, is the one to end it.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)

from gpt2x.streams.filler import main  # noqa: E402

main()
