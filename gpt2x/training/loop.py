"""The training loop: batches in, checkpoints out."""

import math
import time

from gpt2x.batches.loader import StepBatch
from gpt2x.checkpoints.progress import Progress
from gpt2x.checkpoints.retention import note_validation
from gpt2x.distributed.flags import Vote, agree
from gpt2x.errors import UserError
from gpt2x.evaluation.samples import sample_texts
from gpt2x.evaluation.validation import Validation, validate
from gpt2x.training.giving_up import find_unsound, give_up
from gpt2x.training.job import Job
from gpt2x.training.obstacles import StepOutcome, reason_to_stop
from gpt2x.training.recording import Recorder
from gpt2x.training.save_points import finish_saving, reserve_copies, save_before_decay, save_checkpoint
from gpt2x.training.signals import StopRequest
from gpt2x.training.spikes import SpikeDetector, record_spike, suspects
from gpt2x.training.steps import optimizer_step

# While a stream is waited for: how often the ranks ask each other, and when that is said.
ROUND_S, SILENT_S = 1.0, 60.0


def train(job: Job, progress: Progress, recorder: Recorder, stop: StopRequest) -> Validation | None:
    """Trains until the budget is spent or a signal asks to stop; saves either way.

    Args:
        job: what to train.
        progress: where the run stands; advanced in place.
        recorder: takes the metrics.
        stop: the signals received by this process.

    Returns:
        The final validation; None where the run was stopped before its end.

    Raises:
        UserError: where the data ends or the loss is not finite, after the run was saved; where saving fails.
    """
    recipe, accelerator, detector = job.recipe, job.accelerator, SpikeDetector()
    job.model.train()
    stopped = not progress.is_followed_up and not follow_up(job, progress, recorder, stop)
    while not stopped and not job.budget.is_spent(progress):
        save_before_decay(job, progress)
        started = time.perf_counter()
        batch = read_batch(job, progress, recorder, stop)
        if batch is None:
            stopped = True
            break
        outcome = optimizer_step(job, progress, batch.micro_batches)
        own = Vote(
            seconds=time.perf_counter() - started,
            stops=stop.is_asked() or job.saver.has_failed,
            saves=stop.takes_save_request(),
            is_spike=outcome.obstacle is None and detector.is_spike(outcome.metrics["train/loss"]),
            checksum=batch.checksum,
        )
        vote = agree(accelerator, own)
        handle_incident(job, progress, outcome, detector, is_spike=vote.is_spike)
        progress.scaler_skipped_steps += outcome.has_overflowed
        progress.advance(tokens=recipe.train.tokens_per_step, seconds=vote.seconds)
        stop.hold()
        job.batches.release(progress.step)
        reserve_copies(job, progress)

        metrics = outcome.metrics | job.batches.accounts(progress.step)
        metrics |= {"tokens_per_s": recipe.train.tokens_per_step / vote.seconds, "data/checksum": vote.checksum}
        metrics |= progress.left_out()
        recorder.show(progress, metrics)
        recorder.note_waiting(job.batches.waited_s, vote.seconds)
        if _is_due(progress, recipe.train.logging_steps):
            recorder.record(progress, metrics)
        stopped = vote.stops or not follow_up(job, progress, recorder, stop, saves=vote.saves)

    if not job.saver.has_failed:
        save_checkpoint(job, progress, is_last=True)
    validation = None if stopped else evaluate(job, progress, recorder, stop)
    if validation is not None:
        note_validation(progress, validation.loss)
        check_validation(job, progress, validation)
        validation = validation if write_samples(job, progress, recorder, stop) else None
    finish_saving(job)
    stop.let_go()  # what follows can be repeated from the last checkpoint
    return None if validation is None or _is_stopped(job, stop) else validation


def check_validation(job: Job, progress: Progress, validation: Validation) -> None:
    """Lets older checkpoints give way to the last one, which its validation shows to be sound.

    Raises:
        UserError: where it does not.
    """
    if not math.isfinite(validation.loss):
        raise give_up(job, progress.step, f"step {progress.step}: the validation loss is {validation.loss}")
    finish_saving(job)
    job.saver.confirm(progress.step, best_step=progress.best_step)


def follow_up(job: Job, progress: Progress, recorder: Recorder, stop: StopRequest, *, saves: bool = False) -> bool:
    """Validates, samples and saves where that is due after a step; at the end of the budget train does it.

    Args:
        job: what is trained.
        progress: where the run stands.
        recorder: takes the metrics.
        stop: the signals received by this process.
        saves: whether a signal asked to save now.

    Returns:
        False where a signal asked to stop: what is still due is done when the run goes on.
    """
    evaluation, train, is_last = job.recipe.evaluation, job.recipe.train, job.budget.is_spent(progress)
    if saves:
        save_checkpoint(job, progress)
    is_best = False
    if not is_last and _is_due(progress, evaluation.eval_steps):
        validation = evaluate(job, progress, recorder, stop)
        if validation is None:
            return False
        is_best = note_validation(progress, validation.loss)
    if not is_last and _is_due(progress, evaluation.sample_steps) and not write_samples(job, progress, recorder, stop):
        return False
    progress.is_followed_up = True
    if _is_due(progress, train.save_steps) or (is_best and train.save_best):
        save_checkpoint(job, progress)
    return True


def handle_incident(
    job: Job, progress: Progress, outcome: StepOutcome, detector: SpikeDetector, *, is_spike: bool
) -> None:
    """Writes down a step that is out of the ordinary, on all ranks together.

    Raises:
        UserError: where the run must not go on; what it was before the step is saved where that is sound.
    """
    if outcome.obstacle is not None:
        reason = reason_to_stop(job, progress, outcome, detector)
        if reason is not None:
            raise _stopped_by(job, progress, *reason)
        return
    progress.skipped_in_a_row = 0
    job.saver.confirm(progress.step, best_step=progress.best_step)
    if is_spike:
        found = suspects(job, outcome.losses)
        if job.accelerator.is_main_process:
            loss = outcome.metrics["train/loss"]
            record_spike(job, progress, found, reason="loss spike", detector=detector, loss=loss)


def _stopped_by(job: Job, progress: Progress, reason: str, remedy: str) -> UserError:
    """The end of a run before a step that is not finite, for which the step is to blame, or the weights before it."""
    unsound = find_unsound(job)
    if unsound is not None:
        return give_up(job, progress.step, f"{reason}, and the weights before it are not sound: {unsound}")
    save_checkpoint(job, progress, is_last=True)
    finish_saving(job)
    return UserError(f"{reason}; the state before the step is saved: {remedy}.")


def read_batch(job: Job, progress: Progress, recorder: Recorder, stop: StopRequest) -> StepBatch | None:
    """This rank's batch of the next step; None where a signal asked to stop while it was waited for.

    A stream may be waited for for long. Then the ranks ask each other every second, so that none waits in a
    collective for the others, and each hears what was asked of any.

    Raises:
        UserError: where the data has ended for good, on all ranks together, after the run was saved.
    """
    if not job.batches.can_fail:  # files are simply there
        return job.batches.step(progress.step, last=job.budget.max_steps)
    batch, failure, silent_until = None, None, time.monotonic() + SILENT_S
    while True:
        try:
            batch = batch or job.batches.step(progress.step, last=job.budget.max_steps, patience_s=ROUND_S)
        except UserError as error:
            failure = error
        own = Vote(stops=stop.is_asked(), waits=batch is None, fails=failure is not None)
        vote = agree(job.accelerator, own)
        if vote.fails:
            save_checkpoint(job, progress, is_last=True)
            finish_saving(job)
            raise failure or UserError("the data of another process has ended; see its message.")
        if not vote.waits:
            return batch
        if vote.stops:
            return None
        if time.monotonic() > silent_until:
            recorder.say(f"step {progress.step + 1} waits for its stream; Ctrl-C saves and leaves.")
            silent_until = math.inf


def evaluate(job: Job, progress: Progress, recorder: Recorder, stop: StopRequest) -> Validation | None:
    """Validates on the whole held-out set, scores HellaSwag where the recipe asks for it, and records the results.

    Returns:
        The validation; None where a signal asked to stop.
    """
    validation = validate(
        job.model,
        job.validation_batches,
        num_bytes=job.validation_batches.num_bytes,
        accelerator=job.accelerator,
        is_stopped=lambda: _is_stopped(job, stop),
    )
    if validation is None:
        return None
    recorder.record(progress, validation.metrics())
    recorder.say(
        f"step {progress.step}: validation loss {validation.loss:.4f}, {validation.bits_per_byte:.4f} bits per "
        f"byte, perplexity {validation.perplexity:.2f}, token accuracy {validation.token_accuracy:.1%}"
    )
    return validation if score_hellaswag(job, progress, recorder, stop) else None


def score_hellaswag(job: Job, progress: Progress, recorder: Recorder, stop: StopRequest) -> bool:
    """Scores the items that the recipe asks for, none by default, and records the result.

    Returns:
        False where a signal asked to stop.
    """
    if job.hellaswag is None:
        return True
    scores = job.hellaswag.score(job.model, job.accelerator, lambda: _is_stopped(job, stop))
    if scores is None:
        return False
    recorder.record(progress, scores.metrics())
    recorder.say(
        f"step {progress.step}: {scores.style} on {scores.num_items:,} items, acc {scores.acc:.4f} ± "
        f"{scores.acc_stderr:.4f}, acc_norm {scores.acc_norm:.4f} ± {scores.acc_norm_stderr:.4f}"
    )
    return True


def write_samples(job: Job, progress: Progress, recorder: Recorder, stop: StopRequest) -> bool:
    """Continues the prompts, prints the texts and appends them to samples.jsonl.

    Returns:
        False where a signal asked to stop.
    """
    for prompt in job.prompts:
        if _is_stopped(job, stop):
            return False
        text = None
        with job.failures.tolerated("sampling", say=recorder.say):
            (text,) = sample_texts(
                job.plain_model,
                job.tokenizer,
                [prompt],
                max_new_tokens=job.recipe.evaluation.max_new_tokens,
                seed=job.recipe.run.seed,
            )
        job.model.train()  # what has failed half-way leaves it in evaluation mode
        if text is not None and job.accelerator.is_main_process:
            job.run.append(job.run.samples_file, {"step": progress.step, "prompt": prompt, "text": text})
            recorder.say(f"--- sample at step {progress.step} ---\n{prompt}>>>{text}")
    return True


def _is_stopped(job: Job, stop: StopRequest) -> bool:
    return agree(job.accelerator, Vote(stops=stop.is_asked())).stops


def _is_due(progress: Progress, interval: int | None) -> bool:
    return interval is not None and progress.step % interval == 0
