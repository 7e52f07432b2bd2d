"""Reading ahead: the next steps' batches are read while the present one is trained on."""

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor

from gpt2x.batches.loader import StepBatch, TrainingBatches
from gpt2x.distributed.devices import map_distinct


class ReadAhead:
    """Reads the steps to come in threads: numpy copies from the memory maps without holding Python's lock.

    Since a step's batch is a pure function of its number, neither the number of threads nor how far they read ahead
    can change anything but speed.

    Attributes:
        batches: what is read.
        waited_s: how long the last batch was waited for.
    """

    def __init__(
        self, batches: TrainingBatches, *, num_workers: int = 1, prefetch_steps: int = 2, pin_memory: bool = False
    ) -> None:
        """Starts no thread yet.

        Args:
            batches: what to read.
            num_workers: threads; 0 reads in step() itself, unless a source may be waited for.
            prefetch_steps: how many steps are read ahead.
            pin_memory: whether batches are put into page-locked memory, from which a GPU copies by itself.
        """
        self.batches, self.pin_memory, self.waited_s = batches, pin_memory, 0.0
        self.prefetch_steps = prefetch_steps if num_workers else 0
        self._threads = ThreadPoolExecutor(max(num_workers, 1), thread_name_prefix="read-ahead")
        self._pending: dict[int, Future[StepBatch]] = {}
        self._waiting_since: float | None = None

    def step(self, step: int, *, last: int | None = None, patience_s: float | None = None) -> StepBatch | None:
        """This process's batch for a step.

        Args:
            step: any; in order it is there already.
            last: the first step that will not be asked for, beyond which nothing is read.
            patience_s: how long to wait for a source that may be waited for; None for as long as it takes.

        Returns:
            The batch; None where it is not there in time. It goes on being read.

        Raises:
            UserError: what reading it raised.
        """
        self._waiting_since = self._waiting_since or time.perf_counter()
        is_ahead = self.prefetch_steps or self.can_fail
        batch = self._ahead(step, last, patience_s) if is_ahead else self._read(step)
        if batch is not None:
            self.waited_s, self._waiting_since = time.perf_counter() - self._waiting_since, None
        return batch

    @property
    def can_fail(self) -> bool:
        """Whether a source may end in the middle of a run, as a stream may."""
        return any(source.num_windows is None for source in self.batches.sources.values())

    def release(self, step: int) -> None:
        """Says that every process has trained on everything before this step."""
        self.batches.release(step)

    def accounts(self, step: int) -> dict[str, float]:
        """How much of each source was trained on before a step, and how long the last step waited."""
        return self.batches.accounts(step) | {"data/waited_s": self.waited_s}

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint must hold of the data to go on at a step."""
        return self.batches.state(step)

    def _ahead(self, step: int, last: int | None, patience_s: float | None) -> StepBatch | None:
        wanted = range(step, min(step + self.prefetch_steps + 1, last or step + self.prefetch_steps + 1))
        for number in [number for number in self._pending if number not in wanted]:
            self._pending.pop(number).cancel()
        for number in wanted:
            if number not in self._pending:
                self._pending[number] = self._threads.submit(self._read, number)
        if not self._pending[step].done() and not wait([self._pending[step]], timeout=patience_s).done:
            return None
        return self._pending.pop(step).result()

    def _read(self, step: int) -> StepBatch:
        batch = self.batches.step(step)
        if not self.pin_memory:
            return batch
        pinned = [map_distinct(Tensor.pin_memory, part) for part in batch.micro_batches]
        return batch._replace(micro_batches=pinned)

    def close(self) -> None:
        """Ends the threads, and what works for the sources."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.batches.close()
        self._threads.shutdown(wait=True)
