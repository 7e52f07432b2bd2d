"""The filler process: `python -m gpt2x.streams`, started by gpt2x.streams.process."""

import signal

# Before the imports, which take seconds: a Ctrl-C or a cluster's SIGTERM goes to the whole group of processes, and
# the training, which still needs the filler while it saves, is the one to end it.
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)

from gpt2x.streams.filler import main  # noqa: E402

main()
