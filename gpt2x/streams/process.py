"""Starting the filler, keeping it alive, ending it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

from gpt2x.config import FillerRecipe
from gpt2x.errors import UserError
from gpt2x.files import BusyError, discard, locked, make_directory, unwritable
from gpt2x.streams.ledger import Beginning, failure_file, write_failure

# A filler that ends this soon after it was started again will not do better the next time.
AT_ONCE_S = 20.0
END_S = 5.0


class FillerProcess:
    """The filler of a cache, as a child of this process, which has the cache to itself.

    A filler may outlive this process by a moment; that the next one waits for it is the filler's business.

    Attributes:
        process: the child, while there is one.
    """

    def __init__(self, name: str, cache_dir: Path) -> None:
        """Takes possession of a cache.

        Raises:
            UserError: where another run uses it.
        """
        self.name, self.cache_dir, self.log_file = name, cache_dir, cache_dir / "filler.log"
        make_directory(cache_dir)
        self._lock = ExitStack()
        try:
            self._lock.enter_context(locked(cache_dir / "run.lock"))
        except BusyError as error:
            raise UserError(
                f"stream.cache_dir '{cache_dir}' is used by another run ({error}); give each run its own, or end "
                f"that one."
            ) from None
        self.process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        # The number of the next shard when it was last started again.
        self._restarted_at: int | None = None

    def start(self, recipe: FillerRecipe) -> None:
        """Starts the process; what it says goes into filler.log."""
        discard(failure_file(self.cache_dir))
        make_directory(self.cache_dir)
        with unwritable(self.log_file):
            log = self.log_file.open("ab")
        with log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpt2x.streams"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Not of the terminal's group, whose Ctrl-C would reach it before it can ignore it.
                start_new_session=True,
            )
        self._started_at = time.monotonic()
        self._tell(asdict(recipe))

    def keep_alive(self, recipe: Callable[[], FillerRecipe]) -> None:
        """Starts the process again where it has died. Where it dies again at once, or before it has made a shard, the
        failure is recorded instead."""
        if self.process is None or self.process.poll() is None or failure_file(self.cache_dir).is_file():
            return
        status = self._end()
        restart = recipe()
        number = len(restart.ledger["shards"]) + restart.ledger["beginning"]["number"]
        did_nothing = time.monotonic() - self._started_at < AT_ONCE_S or number == self._restarted_at
        if self._restarted_at is not None and did_nothing:
            write_failure(
                self.cache_dir,
                f"the filler of stream {self.name!r} ended twice (status {status}); its last words: "
                f"{self._last_words()!r}; {self.log_file} has the rest.",
            )
            return
        self._restarted_at = number
        self.start(restart)

    def forget_before(self, beginning: Beginning) -> None:
        """Says which era is the oldest that is needed."""
        self._tell(asdict(beginning))

    def close(self) -> None:
        """Ends the process and gives the cache free."""
        self._end()
        self._lock.close()

    def _tell(self, content: dict) -> None:
        if self.process is None or self.process.stdin is None:
            return
        # A filler that has died is noticed by keep_alive, and its successor is told everything.
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(content).encode() + b"\n")
            self.process.stdin.flush()

    def _end(self) -> int | None:
        """Ends the process, by its pipe or else by force; its exit status."""
        if (process := self.process) is None:
            return None
        self.process = None
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            return process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _last_words(self) -> str:
        lines = self.log_file.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "none")
