"""Training batches: the micro-batches of one process for one optimizer step."""

from collections.abc import Sequence

import numpy as np
import torch

from gpt2x.batches.order import GlobalOrder
from gpt2x.batches.source import Source
from gpt2x.errors import UserError


class TrainingBatches:
    """Step s reads the positions [s * G, (s + 1) * G) of the global order, G = sequences_per_step.

    Process r of W takes the r-th contiguous G / W of them, and its micro-batch a the a-th micro_batch_size of those.
    Nothing is kept between calls, so any step can be asked for at any time, and the samples of a step do not depend
    on W or the micro-batches.
    """

    def __init__(
        self,
        order: GlobalOrder,
        sources: Sequence[Source],
        *,
        sequences_per_step: int,
        micro_batch_size: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Checks that the sources are enough for a step, and that it can be cut evenly.

        Raises:
            UserError: where either is not so.
        """
        per_pass = micro_batch_size * num_processes
        if sequences_per_step % per_pass:
            raise UserError(
                f"{sequences_per_step} sequences per step must be a multiple of micro_batch_size x processes = "
                f"{micro_batch_size} x {num_processes} = {per_pass}; change train.tokens_per_step or micro_batch_size."
            )
        self.order, self.sources = order, sources
        self.sequences_per_step, self.micro_batch_size = sequences_per_step, micro_batch_size
        self.rank, self.num_processes = rank, num_processes
        self._check_enough(per_pass)

    def step(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of this process for an optimizer step, on the CPU.

        Returns:
            Per micro-batch input_ids (B, T) int64 and labels, the same tensor: the model shifts them.
        """
        per_process = self.sequences_per_step // self.num_processes
        start = step * self.sequences_per_step + self.rank * per_process
        ids = torch.from_numpy(self._sequences(start, start + per_process))
        return [{"input_ids": part, "labels": part} for part in ids.split(self.micro_batch_size)]

    def _sequences(self, start: int, stop: int) -> np.ndarray:
        """The token ids at these positions of the order, (stop - start, T) int64."""
        sources, windows = self.order.sample_positions(start, stop)
        parts = {number: self.sources[number].windows(windows[sources == number]) for number in np.unique(sources)}
        if len(parts) == 1:
            return next(iter(parts.values()))
        sequences = np.empty((stop - start, next(iter(parts.values())).shape[1]), np.int64)
        for number, part in parts.items():
            sequences[sources == number] = part
        return sequences

    def _check_enough(self, per_pass: int) -> None:
        num_windows = sum(source.num_windows for source in self.sources)
        if num_windows >= self.sequences_per_step:
            return
        length = self.sources[0].windows(np.array([0])).shape[1]
        fitting = num_windows // per_pass * per_pass
        remedy = f"train.tokens_per_step to {fitting} x {length} = {fitting * length} or less"
        if not fitting:
            remedy = f"micro_batch_size x processes ({per_pass}) to {num_windows} or less, with tokens_per_step"
        raise UserError(
            f"the data has {num_windows} sequences of {length} tokens, fewer than the {self.sequences_per_step} of "
            f"one step; set {remedy}, shorten data.sequence_length, or give more text."
        )
