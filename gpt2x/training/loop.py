"""The training loop: batches in, checkpoints out."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gpt2x.batches.loader import StepBatch
from gpt2x.errors import UserError
from gpt2x.evaluation import Validation, sample_texts, validate
from gpt2x.models import save_model
from gpt2x.training.checkpoints import (
    checkpoint_dir,
    is_whole,
    optimizer_tensors,
    prune_checkpoints,
    write_checkpoint,
)
from gpt2x.training.job import Job
from gpt2x.training.optimizers import set_learning_rates
from gpt2x.training.recording import Recorder, append_record
from gpt2x.training.schedules import learning_rate_factor
from gpt2x.training.signals import StopRequest
from gpt2x.training.state import Progress, seed_step

MicroBatch = Mapping[str, Tensor]


def train(job: Job, progress: Progress, recorder: Recorder, stop: StopRequest) -> Validation | None:
    """Trains until the budget is spent or a signal asks to stop; saves either way.

    Args:
        job: what to train.
        progress: where the run stands; advanced in place.
        recorder: takes the metrics.
        stop: the signals received by this process.

    Returns:
        The final validation; None where the run was stopped before its end.
    """
    recipe, accelerator = job.recipe, job.accelerator
    job.model.train()
    stopped = not progress.is_followed_up and not follow_up(job, progress, recorder, stop)
    while not stopped and not job.budget.is_spent(progress):
        started = time.perf_counter()
        batch = read_batch(job, progress)
        metrics = optimizer_step(job, progress, batch.micro_batches)
        seconds, stopped, checksum = agree(
            accelerator, time.perf_counter() - started, stop.signal_number is not None, batch.checksum
        )
        progress.advance(tokens=recipe.train.tokens_per_step, seconds=seconds)
        job.batches.release(progress.step)
        metrics |= {"tokens_per_s": recipe.train.tokens_per_step / seconds, "data/checksum": checksum}
        metrics |= job.batches.accounts(progress.step)

        recorder.show(progress, metrics)
        if _is_due(progress, recipe.train.logging_steps):
            recorder.record(progress, metrics)
        stopped = stopped or not follow_up(job, progress, recorder, stop)

    save_checkpoint(job, progress)
    validation = None if stopped else evaluate(job, progress, recorder, stop)
    if validation is not None:
        write_samples(job, progress, recorder)
    return validation


def follow_up(job: Job, progress: Progress, recorder: Recorder, stop: StopRequest) -> bool:
    """Validates, samples and saves where that is due after a step; at the end of the budget train does it.

    Returns:
        False where a signal asked to stop: what is still due is done when the run goes on.
    """
    evaluation, is_last = job.recipe.evaluation, job.budget.is_spent(progress)
    is_evaluated = not is_last and _is_due(progress, evaluation.eval_steps)
    if is_evaluated and evaluate(job, progress, recorder, stop) is None:
        return False
    if not is_last and _is_due(progress, evaluation.sample_steps):
        write_samples(job, progress, recorder)
    progress.is_followed_up = True
    if _is_due(progress, job.recipe.train.save_steps):
        save_checkpoint(job, progress)
    return True


def read_batch(job: Job, progress: Progress) -> StepBatch:
    """This rank's batch of the next step.

    Raises:
        UserError: where the data has ended for good, on all ranks together, after the run was saved.
    """
    batch, failure = None, None
    try:
        batch = job.batches.step(progress.step, last=job.budget.max_steps)
    except UserError as error:
        failure = error
    if job.batches.can_fail:  # where a file cannot, the ranks need not ask each other
        _, is_broken, _ = agree(job.accelerator, 0.0, failure is not None)
        failure = failure or (
            UserError("the data of another process has ended; see its message.") if is_broken else None
        )
    if failure is not None:
        save_checkpoint(job, progress)
        raise failure
    assert batch is not None
    return batch


def optimizer_step(job: Job, progress: Progress, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
    """One update of the weights from all micro-batches of a step.

    The loss is the sum of the cross-entropies of the whole step, over micro-batches and ranks, divided by the step's
    valid tokens, so that the gradient does not depend on how the step is cut.

    Returns:
        The step's metrics, the same on all ranks.
    """
    accelerator, model = job.accelerator, job.model
    seed_step(job.recipe.run.seed, step=progress.step, rank=accelerator.process_index)
    factor = learning_rate_factor(
        job.recipe.optimizer, warmup=job.budget.warmup(progress), progress=job.budget.decay(progress)
    )
    set_learning_rates(job.optimizers, factor)
    loss = accumulate_gradients(accelerator, model, micro_batches)
    grad_norm = clip_gradients(accelerator, model, job.recipe.train.max_grad_norm)
    for optimizer in job.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {
        "train/loss": loss.item(),
        "learning_rate": job.optimizers[0].param_groups[0]["lr"],
        "grad_norm": grad_norm,
    }


def accumulate_gradients(accelerator: Accelerator, model: nn.Module, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Adds up the gradients of a step's micro-batches; ranks exchange them once, after the last.

    Data-parallel wrappers average over ranks, so each rank divides its sum by the valid tokens per rank.

    Returns:
        The step's mean cross-entropy over all ranks, a scalar.
    """
    valid = torch.stack([count_targets(batch["labels"]) for batch in micro_batches]).sum().to(accelerator.device)
    tokens_per_rank = accelerator.reduce(valid, reduction="sum") / accelerator.num_processes
    total = torch.zeros((), device=accelerator.device)
    for position, batch in enumerate(micro_batches):
        is_last = position == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            loss = model(
                **{key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()},
                num_items_in_batch=tokens_per_rank,
                return_logits=False,
                use_cache=False,
            ).loss
            accelerator.backward(loss)
        total += loss.detach()
    return accelerator.reduce(total, reduction="mean")


def count_targets(labels_BT: Tensor) -> Tensor:
    """How many tokens of unshifted labels are predicted: the model shifts, so a row's first never is."""
    return (labels_BT[:, 1:] != -100).sum()


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float | None) -> float:
    """Scales the gradients down to ``max_norm`` and returns their norm before that."""
    return float(accelerator.clip_grad_norm_(model.parameters(), float("inf") if max_norm is None else max_norm))


def agree(accelerator: Accelerator, seconds: float, stopped: bool, checksum: int = 0) -> tuple[float, bool, int]:
    """Rank 0's clock, anyone's wish to stop and the sum of the checksums, the same on all ranks."""
    if accelerator.num_processes == 1:
        return seconds, stopped, checksum
    own_clock = round(seconds * 1e6) if accelerator.is_main_process else 0
    own = torch.tensor([own_clock, int(stopped), checksum], device=accelerator.device)
    microseconds, num_stopped, total = accelerator.reduce(own, reduction="sum").tolist()
    return microseconds / 1e6, num_stopped > 0, total


def evaluate(job: Job, progress: Progress, recorder: Recorder, stop: StopRequest) -> Validation | None:
    """Validates on the whole held-out set and records the result; None where a signal asked to stop."""
    validation = validate(
        job.model,
        job.validation_batches,
        num_bytes=job.validation_batches.num_bytes,
        accelerator=job.accelerator,
        is_stopped=lambda: agree(job.accelerator, 0.0, stop.signal_number is not None)[1],
    )
    if validation is not None:
        recorder.record(progress, validation.metrics())
        recorder.say(
            f"step {progress.step}: validation loss {validation.loss:.4f}, {validation.bits_per_byte:.4f} bits per "
            f"byte, perplexity {validation.perplexity:.2f}, token accuracy {validation.token_accuracy:.1%}"
        )
    return validation


def write_samples(job: Job, progress: Progress, recorder: Recorder) -> None:
    """Continues the prompts, prints the texts and appends them to samples.jsonl."""
    texts = sample_texts(
        job.plain_model,
        job.tokenizer,
        job.prompts,
        max_new_tokens=job.recipe.evaluation.max_new_tokens,
        seed=job.recipe.run.seed,
    )
    for prompt, text in zip(job.prompts, texts, strict=True):
        recorder.say(f"--- sample at step {progress.step} ---\n{prompt}>>>{text}")
        if job.accelerator.is_main_process:
            append_record(job.run.samples_file, {"step": progress.step, "prompt": prompt, "text": text})


def save_checkpoint(job: Job, progress: Progress) -> Path:
    """Writes a checkpoint of where the run stands, then deletes those that are no longer kept."""
    target = checkpoint_dir(job.run.path, progress.step)
    if job.accelerator.is_main_process and not is_whole(target):
        write_checkpoint(
            target,
            write_model=lambda directory: _write_model(job, directory),
            optimizer=optimizer_tensors(job.optimizers, job.parameter_names),
            trainer={
                "step": progress.step,
                "tokens": progress.tokens,
                "elapsed_s": progress.elapsed_s,
                "step_s": progress.step_s,
                "is_followed_up": progress.is_followed_up,
                "optimizer": job.recipe.optimizer.name,
                "data": job.batches.state(progress.step),
            },
        )
        prune_checkpoints(job.run.path, keep=job.recipe.train.save_total_limit)
    job.accelerator.wait_for_everyone()
    return target


def _write_model(job: Job, directory: Path) -> None:
    save_model(job.plain_model, directory, job.tokenizer)


def _is_due(progress: Progress, interval: int | None) -> bool:
    return interval is not None and progress.step % interval == 0
