"""The end of a run whose state is not worth a checkpoint."""

import math
import os
from collections.abc import Iterable
from itertools import chain, islice

from torch import Tensor
from torch.distributed.tensor import DTensor

from gpt2x.checkpoints.optimizer_state import optimizer_tensors
from gpt2x.checkpoints.soundness import first_not_finite, not_saved
from gpt2x.distributed.flags import Vote, agree, wait_for_main
from gpt2x.errors import UserError
from gpt2x.evaluation.validation import validate
from gpt2x.files import set_aside
from gpt2x.runs.layout import checkpoint_dir
from gpt2x.training.job import Job


def find_unsound(job: Job) -> str | None:
    """What speaks against the present state, the same on all ranks, which must all ask; None where nothing does.

    Weights and optimizer state must be finite, and so must the loss of a validation batch: weights may be finite and
    so large that no loss is.
    """
    name = first_not_finite(_local_tensors(job))
    if agree(job.accelerator, Vote(stops=name is not None)).stops:
        return f"{name or 'a part on another process'} is not finite"
    (batch,) = islice(job.validation_batches, 1)
    whole = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}  # every token counts, so there is a loss
    whole |= {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    validation = validate(job.model, [whole], num_bytes={"": 0}, accelerator=job.accelerator)
    assert validation is not None
    return None if math.isfinite(validation.loss) else f"the loss of a validation batch is {validation.loss}"


def _local_tensors(job: Job) -> Iterable[tuple[str, Tensor]]:
    """What lies on this process of weights and optimizer state, by name."""
    named: list[Iterable[tuple[str, Tensor]]] = [
        job.plain_model.named_parameters(),
        optimizer_tensors(job.optimizers, job.parameter_names).items(),
    ]
    for name, tensor in chain.from_iterable(named):
        yield name, (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def give_up(job: Job, step: int, reason: str) -> UserError:
    """The end of a run whose state is not sound, on all ranks together: not saved, and nothing deleted. What was
    saved of this very step, before it was known, is set aside."""
    try:
        job.saver.wait()
        if job.accelerator.is_main_process:
            job.run.check()
            checkpoint = checkpoint_dir(job.run.path, step)
            if os.path.lexists(checkpoint):
                reason += f"; {checkpoint} holds it and is set aside as {set_aside(checkpoint).name}"
    finally:
        wait_for_main(job.accelerator)
    return UserError(not_saved(job.run.path, step, reason))
