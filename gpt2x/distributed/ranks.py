"""Which of the processes reads which rows: those that compute one forward pass together read the same ones."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor


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
