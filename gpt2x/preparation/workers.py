"""Processes that work on the parts of a preparation, and the bar that shows how far they are.

They are spawned, not forked: a fork copies the tokenizer's thread pool in the middle of whatever it does. Each has
one pipe to the parent, through which it gets its next part and tells how far it is; a closed pipe is a dead worker.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

from tqdm import tqdm

from gpt2x.distributed.launch import usable_cores
from gpt2x.errors import UserError

Report = Callable[[int, int], None]
"""Told by how much the reading and the tokens have grown: (read, tokens)."""
Work = Callable[..., None]
"""What to do with (recipe, part, report=a Report)."""


def run_parts(work: Work, recipe: Any, parts: Sequence[int], *, num_workers: int, report: Report) -> None:
    """Works on every part once, in processes that share the cores.

    Args:
        work: a function that a fresh interpreter can import.
        recipe: its first argument.
        parts: its second, one after the other.
        num_workers: how many processes.
        report: told what the workers tell.

    Raises:
        UserError: what the work raises, and for a worker that died; the others are ended before.
    """
    num_threads = usable_cores(num_workers)
    waiting = list(parts)[::-1]
    workers: dict[Connection, tuple[BaseProcess, int]] = {}
    try:
        with _deaf_to_interrupts():
            for _ in range(num_workers):
                started, process = _start(work, recipe, num_threads)
                workers[started] = (process, waiting[-1])
                started.send(waiting.pop())
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                _receive(connection, workers, waiting, report)
    finally:
        for process, _ in workers.values():
            process.terminate()
        for process, _ in workers.values():
            process.join()


def _start(work: Work, recipe: Any, num_threads: int) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker, args=(work, recipe, num_threads, theirs), daemon=True)
    process.start()
    theirs.close()  # the worker's death closes the last one
    return ours, process


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal; those started here leave it to the parent, from the first line."""
    resource_tracker.ensure_running()  # the first spawn starts it, which lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(
    connection: Connection, workers: dict[Connection, tuple[BaseProcess, int]], waiting: list[int], report: Report
) -> None:
    process, part = workers[connection]
    try:
        message = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise UserError(_obituary(process, part)) from None
    if isinstance(message, str):
        raise UserError(message)
    if message is not None:
        report(*message)
    elif waiting:
        workers[connection] = (process, waiting[-1])
        connection.send(waiting.pop())
    else:
        connection.close()  # which ends the worker
        process.join()
        del workers[connection]


def _obituary(process: BaseProcess, part: int) -> str:
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    cause = "; perhaps memory ran out: set a smaller num_workers" if code == -signal.SIGKILL else ""
    return (
        f"the worker of task {part} (process {process.pid}) {how}{cause}; run the command again: finished tasks are "
        f"kept."
    )


def _worker(work: Work, recipe: Any, num_threads: int, connection: Connection) -> None:
    """The whole life of a worker."""
    # Read when the tokenizer's threads start, which is at its first batch.
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_threads > 1 else "false"
    try:
        while True:
            work(recipe, connection.recv(), report=lambda read, tokens: connection.send((read, tokens)))
            connection.send(None)
    except UserError as error:
        connection.send(str(error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is done, or gone


@contextmanager
def progress_bar(description: str, *, total: int | None, unit: str) -> Iterator[Report]:
    """A bar of what has been read, with tokens per second and the time left; silent where nobody watches.

    Yields:
        What moves it on.
    """
    sum_tokens, started = 0, monotonic()

    def report(read: int, tokens: int) -> None:
        nonlocal sum_tokens
        sum_tokens += tokens
        rate = sum_tokens / max(monotonic() - started, 1e-9)
        bar.set_postfix_str(f"{sum_tokens / 1e6:,.1f}M tokens, {rate / 1e3:,.0f}k tokens/s", refresh=False)
        bar.update(read)

    with tqdm(total=total, desc=description, unit=unit, unit_scale=True, disable=None, smoothing=0.05) as bar:
        yield report
