"""Training batches: the micro-batches of one process for one optimizer step."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from gpt2x.batches.order import GlobalOrder, mixed
from gpt2x.batches.source import Source
from gpt2x.batches.windows import IGNORED, Sequences, document_positions, joined
from gpt2x.errors import UserError


class StepBatch(NamedTuple):
    """What one process reads for one optimizer step."""

    micro_batches: list[dict[str, torch.Tensor]]
    """input_ids (B, T) int64 and labels, which the model shifts: the same tensor, or another one with -100 where a
    token is not learned. position_ids (B, T) int64 where documents are masked from each other."""
    checksum: int
    """Of every sequence, added up: over all processes the same number however the step was cut."""


def checksum(ids_BT: np.ndarray) -> int:
    """Sum over the sequences of a 32-bit hash of each: a multiply-sum hash, as cheap as reading them.

    Args:
        ids_BT: token ids, (B, T) int64.
    """
    sums_B = np.einsum("bt,t->b", ids_BT, _multipliers(ids_BT.shape[1]))
    return int((mixed(sums_B.view(np.uint64)) >> np.uint64(32)).sum())


@lru_cache
def _multipliers(length: int) -> np.ndarray:
    return (mixed(np.arange(1, length + 1, dtype=np.uint64)) | np.uint64(1)).view(np.int64)


class TrainingBatches:
    """Step s reads the places of its batch from the global order.

    Process r of W takes the r-th contiguous W-th of them, and its micro-batch a the a-th micro_batch_size of those.
    Nothing is kept between calls, so any step can be asked for at any time and by any thread, and the samples of a
    step do not depend on W or the micro-batches.
    """

    def __init__(
        self,
        order: GlobalOrder,
        sources: Sequence[Source],
        *,
        micro_batch_size: int,
        rank: int = 0,
        num_processes: int = 1,
        mask_documents_at: int | None = None,
    ) -> None:
        """Checks that the sources are enough for a step, and that it can be cut evenly.

        Args:
            order: which source's which draw stands where; knows every source by its name.
            sources: the sources of its last phase.
            micro_batch_size: sequences per process and forward pass.
            rank: this process among num_processes.
            num_processes: data-parallel processes.
            mask_documents_at: the end-of-text id at which documents are masked from each other; None to leave them as
                the sources give them.

        Raises:
            UserError: where either is not so.
        """
        self.order, self.sources = order, {source.name: source for source in sources}
        self.micro_batch_size, self.rank, self.num_processes = micro_batch_size, rank, num_processes
        self.mask_documents_at = mask_documents_at
        self.sequence_length = sources[0].sequence_length
        self._check(order.phases[-1].sequences_per_step)

    def step(self, step: int) -> StepBatch:
        """The micro-batches of this process for an optimizer step, on the CPU. Waits for streams.

        Raises:
            UserError: where a stream is broken for good; on every process of a node at the same step.
        """
        self._wait_for_streams(step)
        per_process = self.order.phase_at(step).sequences_per_step // self.num_processes
        drawn = self.order.samples(step, self.rank * per_process, (self.rank + 1) * per_process)
        parts = [(places, self._drawn(self.sources[name], draws)) for name, (places, draws) in drawn.items()]
        ids_BT, labels_BT, position_ids_BT = joined(parts)
        arrays = {"input_ids": ids_BT, "labels": labels_BT, "position_ids": position_ids_BT}
        batch = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
        split = (tensor.split(self.micro_batch_size) for tensor in batch.values())
        micro_batches = [dict(zip(batch, tensors)) for tensors in zip(*split)]
        for micro_batch in micro_batches:
            micro_batch.setdefault("labels", micro_batch["input_ids"])
        return StepBatch(micro_batches, checksum(ids_BT))

    def _wait_for_streams(self, step: int) -> None:
        streams = {name: source for name, source in self.sources.items() if source.num_windows is None}
        if streams:
            firsts, ends = self.order.draws_before(step), self.order.draws_before(step + 1)
            for name, stream in streams.items():
                stream.require(ends.get(name, 0), first=firsts.get(name, 0))

    def locate(self, step: int, place: int) -> str:
        """Where the sequence at a place of a step's whole batch was read, for a person."""
        ((name, (_, draws)),) = self.order.samples(step, place, place + 1).items()
        return f"{name}: {self.sources[name].locate(int(draws[0]))}"

    def release(self, step: int) -> None:
        """Says that every process has trained on everything before this step."""
        for name, num_draws in self.order.draws_before(step).items():
            if name in self.sources:
                self.sources[name].release(num_draws)

    def accounts(self, step: int) -> dict[str, float]:
        """How much of each source was read before a step, as metrics: epochs, and in a mixture tokens and shares.

        The target is the share that the mixture's weights of the present phase ask for, of the phase's blocks.
        """
        draws = self.order.draws_before(step)
        if len(self.sources) == 1 and len(draws) == 1:
            ((name, source),) = self.sources.items()
            return {"data/epochs": source.epochs(draws[name])}
        phase, total = self.order.phase_at(max(step - 1, 0)), max(sum(draws.values()), 1)
        targets = dict(zip(phase.weights, phase.counts_per_block, strict=True))
        metrics = {}
        for name, source in self.sources.items():
            count = draws.get(name, 0)
            metrics[f"data/{name}/tokens"] = float(count * self.sequence_length)
            metrics[f"data/{name}/share"] = count / total
            metrics[f"data/{name}/target"] = targets.get(name, 0) / phase.block_size
            metrics[f"data/{name}/epochs"] = source.epochs(count)
        return metrics

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint must hold of the data, as JSON, to go on at a step."""
        draws = self.order.draws_before(step)
        sources = {
            name: {"fingerprint": source.fingerprint, "state": source.state(draws.get(name, 0))}
            for name, source in self.sources.items()
        }
        return {
            "seed": self.order.seed,
            "sequence_length": self.sequence_length,
            "phases": self.order.as_json(),
            "skipped": [list(pair) for pair in self.order.skipped],
            "sources": sources,
        }

    def close(self) -> None:
        """Ends what works for the sources in the background."""
        for source in self.sources.values():
            source.close()

    def _drawn(self, source: Source, draws: np.ndarray) -> Sequences:
        """Sequences of a source; where documents are masked from each other, with positions that say so."""
        drawn = source.sequences(draws)
        if self.mask_documents_at is None:
            return drawn
        begins_BT = source.document_begins(draws)
        if begins_BT is None:
            return drawn._replace(position_ids=document_positions(drawn.ids == self.mask_documents_at))
        # Here nothing of its own stands before a document's first token.
        labels_BT = np.where(begins_BT, IGNORED, drawn.ids if drawn.labels is None else drawn.labels)
        return Sequences(drawn.ids, labels_BT, document_positions(begins_BT))

    def _check(self, sequences_per_step: int) -> None:
        per_pass = self.micro_batch_size * self.num_processes
        if sequences_per_step % per_pass:
            raise UserError(
                f"{sequences_per_step} sequences per step must be a multiple of micro_batch_size x processes = "
                f"{self.micro_batch_size} x {self.num_processes} = {per_pass}; change train.tokens_per_step or "
                f"micro_batch_size."
            )
        counts = [source.num_windows for source in self.sources.values()]
        num_windows = sum(count or 0 for count in counts)
        if None in counts or num_windows >= sequences_per_step:
            return
        length, fitting = self.sequence_length, num_windows // per_pass * per_pass
        remedy = f"train.tokens_per_step to {fitting} x {length} = {fitting * length} or less"
        if not fitting:
            remedy = f"micro_batch_size x processes ({per_pass}) to {num_windows} or less, with tokens_per_step"
        raise UserError(
            f"the data has {num_windows} sequences of {length} tokens, fewer than the {sequences_per_step} of one "
            f"step; set {remedy}, shorten data.sequence_length, or give more text."
        )


def check_unchanged(saved: Mapping[str, Any], sources: Sequence[Source], *, seed: int, sequence_length: int) -> None:
    """Compares the data of a run that goes on with what its checkpoint holds.

    Args:
        saved: what TrainingBatches.state gave.
        sources: of the run that goes on; new ones and absent ones are another mixture, which is allowed.
        seed: the run's.
        sequence_length: the run's.

    Raises:
        UserError: for another seed or sequence length, whose order has nothing to do with the old one, and for a
            source whose content has changed.
    """
    for field, then, now in (
        ("run.seed", saved["seed"], seed),
        ("data.sequence_length", saved["sequence_length"], sequence_length),
    ):
        if then != now:
            raise UserError(
                f"{field} ({now}) must stay {then}: with another, samples would be repeated and lost; set it back, or "
                f"start a new run with --run.name NAME and --init_from the checkpoint's model."
            )
    for source in sources:
        then = saved["sources"].get(source.name, {}).get("fingerprint", source.fingerprint)
        if then != source.fingerprint:
            raise UserError(
                f"the data of source {source.name!r} has changed since the checkpoint was made (fingerprint "
                f"{then[:12]}, now {source.fingerprint[:12]}); restore it (and data.packing, data.align_documents), "
                f"give it another name to start it as a source of its own, or start a new run with --run.name NAME."
            )
