"""Reading a stream's rows from any recorded place, through whatever the network does.

A thread reads ahead, so that rows come in while others are tokenized, and so that a connection on which nothing
arrives any more can be given up: the thread is left alone, and another one begins after the last row that arrived.
"""

import queue
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from datasets import Dataset
from huggingface_hub.errors import HfHubHTTPError

from gpt2x.config import CorpusSection
from gpt2x.corpus.dataset_rows import broken_connections, open_rows, reading_errors
from gpt2x.errors import UserError
from gpt2x.streams.ledger import Position

ROWS_AHEAD = 64
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
# A server that is overloaded may say that a file is not there. After so long it is taken at its word.
NEVER_THERE_S = 30.0
# What trying again does not mend, although it is an OSError as broken connections are.
LASTING_ERRORS = (PermissionError, IsADirectoryError, NotADirectoryError)


class Row(NamedTuple):
    """A row's text column and its place."""

    start: Position
    value: Any


@dataclass(frozen=True, kw_only=True)
class Patience:
    """What a stream may do before it counts as broken; see StreamSection."""

    retry_s: float
    stall_s: float


class StreamBrokenError(Exception):
    """Reading failed in a way that trying again does not mend, or has not mended."""


def read_rows(corpus: CorpusSection, start: Position, patience: Patience, *, was_open: bool = False) -> Iterator[Row]:
    """The rows from a position to the end of its epoch, each once.

    A broken connection is opened again after the last row that arrived; the pauses double from half a second to half
    a minute, and begin anew with every row.

    Args:
        corpus: what is streamed.
        start: where to begin.
        patience: when to give up.
        was_open: whether the stream was there at some time. One that never was is likely misspelt, which waiting does
            not mend.

    Raises:
        StreamBrokenError: for an error that lasts: of retry_s or more, a permission, an HTTP status of 4xx but 429.
        UserError: for a stream that never was there, and for a package that is needed to read it.
    """
    failing_since, delay_s, position = None, FIRST_DELAY_S, start
    while True:
        reader = _Reader(corpus, position)
        try:
            for row, after in reader.rows(patience.stall_s):
                position = after
                yield row
                was_open, failing_since, delay_s = True, None, FIRST_DELAY_S
            return
        except ImportError as error:
            raise UserError(
                f"{_described(error)}; http:// files need aiohttp and requests, s3:// ones s3fs."
            ) from None
        except _retried_errors() as error:
            was_never_there = isinstance(error, UserError) and not was_open
            retry_s = min(patience.retry_s, _never_there_s(corpus)) if was_never_there else patience.retry_s
            failing_since = failing_since or time.monotonic()
            left_s = failing_since + retry_s - time.monotonic()
            if was_never_there and left_s <= 0:
                raise
            if _is_lasting(error) or left_s <= 0:
                raise StreamBrokenError(_described(error)) from error
            print(f"{_described(error)}; trying again in {delay_s:.1f} s", file=sys.stderr, flush=True)
            time.sleep(min(delay_s, left_s))
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        except reading_errors() as error:  # rows that are not what they should be, which waiting does not mend
            raise StreamBrokenError(_described(error)) from error
        finally:
            reader.stop()


class _Reader:
    """A thread that reads rows into a short queue until it is told to stop."""

    def __init__(self, corpus: CorpusSection, start: Position) -> None:
        self._corpus, self._start = replace(corpus, streaming=True), start
        self._queue: queue.Queue[tuple[Row, Position] | BaseException | None] = queue.Queue(ROWS_AHEAD)
        self._stopped = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def rows(self, stall_s: float) -> Iterator[tuple[Row, Position]]:
        """Every row with the position after it.

        Raises:
            TimeoutError: where nothing arrives for stall_s.
        """
        while True:
            try:
                found = self._queue.get(timeout=stall_s)
            except queue.Empty:
                raise TimeoutError(f"nothing arrived for {stall_s:.0f} s") from None
            if isinstance(found, BaseException):
                raise found
            if found is None:
                return
            yield found

    def stop(self) -> None:
        """Lets the thread end, as soon as it is not waiting for the network."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            for row in self._read():
                self._put(row)
                if self._stopped.is_set():
                    return
            self._put(None)
        except BaseException as error:  # not swallowed: raised by the thread that waits for rows
            self._put(error)

    def _read(self) -> Iterator[tuple[Row, Position]]:
        opened, here = open_rows(self._corpus), self._start
        rows = opened.to_iterable_dataset() if isinstance(opened, Dataset) else opened
        if here.state is not None:
            rows.load_state_dict(here.state)
        for row in rows:
            after = Position(epoch=here.epoch, state=rows.state_dict())
            yield Row(here, row[self._corpus.text_column]), after
            here = after

    def _put(self, found: tuple[Row, Position] | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(found, timeout=1)
            except queue.Full:
                continue


def _never_there_s(corpus: CorpusSection) -> float:
    """How long a stream is looked for that never was there."""
    is_remote = not corpus.data_files or any("://" in file for file in corpus.data_files)
    return NEVER_THERE_S if is_remote else 0.0


def _retried_errors() -> tuple[type[BaseException], ...]:
    return (UserError, *broken_connections())


def _is_lasting(error: BaseException) -> bool:
    if isinstance(error, LASTING_ERRORS):
        return True
    status = _http_status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def _http_status(error: BaseException | None) -> int | None:
    """The status that an error, or what caused it, was answered with."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        if "aiohttp" in sys.modules and isinstance(error, sys.modules["aiohttp"].ClientResponseError):
            return error.status
        error = error.__cause__ or error.__context__
    return None


def _described(error: BaseException) -> str:
    """The error in one line, and what caused it where that says more."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    lines = [" ".join(str(link).split()) or type(link).__name__ for link in chain]
    return ": ".join(dict.fromkeys(lines))[:500]
