"""The processes of a run: which rows each of them reads, what they decide together, where they wait for each other.

Those that compute one forward pass together read the same rows.

The group that trains has torch's time limits, 30 minutes by gloo and 10 by NCCL, so that a rank that hangs ends the
run. Where one rank may work for longer, on data, a checkpoint or the final model, the others wait as here.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
from accelerate import Accelerator
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from gpt2x.errors import UserError

# Longer than any preparation.
PATIENCE = timedelta(days=30)
# How long the main process waits for others that have nothing to do.
LIMIT = timedelta(minutes=30)
# After so long it is said for whom a process waits.
SILENT_S = 30.0
LOOK_S = 0.05
_MAIN_IS_HERE = "gpt2x/main_is_here"


@dataclass(frozen=True, kw_only=True)
class DataRank:
    """A process among those that read different rows.

    Attributes:
        rank: the process's place among them; processes that read the same rows have the same.
        num_ranks: how many shares the rows are cut into.
        num_copies: processes that read each share: those of a tensor-parallel group, else 1. What they find is the
            same, so a sum over all processes counts it so many times.
        is_first_copy: whether this process is to count where each share counts once.
    """

    rank: int
    num_ranks: int
    num_copies: int
    is_first_copy: bool


def data_rank(accelerator: Accelerator) -> DataRank:
    """Where a process of the run stands; a tensor-parallel group is made of processes in a row."""
    parallelism = accelerator.parallelism_config
    num_copies = 1 if parallelism is None else parallelism.non_data_parallel_size
    rank, copy = divmod(accelerator.process_index, num_copies)
    return DataRank(
        rank=rank,
        num_ranks=accelerator.num_processes // num_copies,
        num_copies=num_copies,
        is_first_copy=copy == 0,
    )


def sum_over_ranks(sums: Tensor, accelerator: Accelerator) -> Tensor:
    """Float64 sums (N, ...) on the CPU, added up over the ranks, a share that several processes read once.

    Their bits travel as integers: not every device has float64.
    """
    bits = accelerator.gather(sums.contiguous().view(torch.int64).to(accelerator.device)).cpu()
    of_all = bits.view(torch.float64).view(accelerator.num_processes, *sums.shape)
    return of_all.sum(0) / data_rank(accelerator).num_copies


# --- decisions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What one rank knows of a step, or all of them together.

    Attributes:
        seconds: how long the step took; of rank 0.
        stops: whether the run is to stop; of any rank.
        saves: whether it is to be saved now; of any rank.
        is_spike: whether the loss is out of the ordinary; of rank 0.
        waits: whether the batch is not there yet; of any rank.
        fails: whether it never will be; of any rank.
        checksum: of the samples; the sum over the ranks, those that read the same counted once.
    """

    seconds: float = 0.0
    stops: bool = False
    saves: bool = False
    is_spike: bool = False
    waits: bool = False
    fails: bool = False
    checksum: int = 0


def agree(accelerator: Accelerator, own: Vote) -> Vote:
    """The votes of all ranks as one, the same on all of them."""
    if accelerator.num_processes == 1:
        return own
    clock, is_spike = (round(own.seconds * 1e6), own.is_spike) if accelerator.is_main_process else (0, False)
    checksum = own.checksum if data_rank(accelerator).is_first_copy else 0
    flags = [own.stops, own.saves, is_spike, own.waits, own.fails]
    numbers = torch.tensor([clock, *flags, checksum], device=accelerator.device)
    microseconds, *counts, checksum = accelerator.reduce(numbers, reduction="sum").tolist()
    stops, saves, spikes, waits, fails = (count > 0 for count in counts)
    return Vote(
        seconds=microseconds / 1e6,
        stops=stops,
        saves=saves,
        is_spike=spikes,
        waits=waits,
        fails=fails,
        checksum=checksum,
    )


# --- waiting ---------------------------------------------------------------------------------------------------------


@contextmanager
def after_main(*, rank: int, num_processes: int) -> Iterator[None]:
    """Has the block, in which the processes make their group, begin after the main one has come to it, which may check
    and prepare data for hours. Signals are heard meanwhile."""
    if num_processes == 1:
        yield
        return
    line = "waiting for the main process, which checks or prepares the data."
    telling = threading.Timer(SILENT_S, print, [line], {"flush": True})
    telling.daemon = True
    if rank == 1:
        telling.start()
    store, _, _ = next(rendezvous("env://", rank, num_processes, timeout=PATIENCE))
    if rank == 0:
        store.set(_MAIN_IS_HERE, "")
    while not store.check([_MAIN_IS_HERE]):
        time.sleep(LOOK_S)
    telling.cancel()
    yield  # the main process has the store until the group is there


def wait_for_everyone(accelerator: Accelerator) -> None:
    """Waits until all ranks are here, however long that takes. Signals are heard meanwhile.

    Raises:
        UserError: where another one has ended.
    """
    _wait(accelerator, PATIENCE)


def wait_for_main(accelerator: Accelerator) -> None:
    """Waits for the main process, however long it works; it waits for the others, who have nothing to do, for LIMIT.

    Raises:
        UserError: where another one has ended, or hangs.
    """
    _wait(accelerator, LIMIT if accelerator.is_main_process else PATIENCE)


def _wait(accelerator: Accelerator, limit: timedelta) -> None:
    if accelerator.num_processes == 1:
        return
    arrival = distributed.barrier(_patient_group(), async_op=True)
    assert arrival is not None
    end, pause_s = time.monotonic() + limit.total_seconds(), 0.001
    while not arrival.is_completed():
        if time.monotonic() > end:
            raise UserError(
                f"another process of the run gives no sign of life for {limit.total_seconds():.0f} s; end it, and the "
                f"same command goes on from the newest checkpoint."
            )
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, LOOK_S)
    try:
        arrival.wait()
    except RuntimeError as error:
        raise UserError("another process of the run has ended; see its message.") from error


def part(accelerator: Accelerator) -> None:
    """Ends the talk between the processes."""
    _patient_group.cache_clear()
    accelerator.state.destroy_process_group()


@cache
def _patient_group() -> distributed.ProcessGroup:
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, distributed.ProcessGroup)
    return group
