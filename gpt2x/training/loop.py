"""The training loop: batches in, checkpoints out."""

import math
import time

from gpt2x.batches.loader import StepBatch
from gpt2x.checkpoints.retention import note_validation
from gpt2x.distributed.ranks import Vote, agree
from gpt2x.errors import UserError
from gpt2x.training.anomalies import SpikeDetector, give_up, handle_incident
from gpt2x.training.evaluators import Metrics
from gpt2x.training.steps import StepOutcome, optimizer_step
from gpt2x.training.trainer import Trainer

# While a stream is waited for: how often the ranks ask each other, and when that is said.
ROUND_S, SILENT_S = 1.0, 60.0


def train(trainer: Trainer) -> Metrics | None:
    """Trains until the budget is spent or a signal asks to stop; saves either way.

    Returns:
        What the evaluators found at the end; None where the run was stopped before.

    Raises:
        UserError: where the data ends or the loss is not finite, after the run was saved; where saving fails.
    """
    progress, detector = trainer.progress, SpikeDetector()
    trainer.model.train()
    stopped = not progress.is_followed_up and not follow_up(trainer)
    while not stopped and not trainer.is_over:
        trainer.save_before_decay()
        started = time.perf_counter()
        batch = read_batch(trainer)
        if batch is None:
            stopped = True
            break
        outcome = optimizer_step(trainer, batch.micro_batches)
        own = Vote(
            seconds=time.perf_counter() - started,
            stops=trainer.stop.is_asked() or trainer.saver.has_failed,
            saves=trainer.stop.take_save_request(),
            is_spike=outcome.obstacle is None and detector.is_spike(outcome.metrics["train/loss"]),
            checksum=batch.checksum,
        )
        vote = agree(trainer.accelerator, own)
        handle_incident(trainer, outcome, detector, is_spike=vote.is_spike)
        progress.scaler_skipped_steps += outcome.has_overflowed
        progress.advance(tokens=trainer.recipe.train.tokens_per_step, seconds=vote.seconds)
        trainer.stop.hold()
        trainer.batches.release(progress.step)
        trainer.reserve_copies()
        record_step(trainer, outcome, vote)
        stopped = vote.stops or not follow_up(trainer, saves=vote.saves)

    if not trainer.saver.has_failed:
        trainer.save(is_last=True)
    found = None if stopped else evaluate(trainer)
    trainer.finish_saving()
    trainer.stop.let_go()  # what follows can be repeated from the last checkpoint
    return None if found is None or trainer.is_stopped() else found


def read_batch(trainer: Trainer) -> StepBatch | None:
    """This rank's batch of the next step; None where a signal asked to stop while it was waited for.

    A stream may be waited for for long. Then the ranks ask each other every second, so that none waits in a
    collective for the others, and each hears what was asked of any.

    Raises:
        UserError: where the data has ended for good, on all ranks together, after the run was saved.
    """
    batches, step, last = trainer.batches, trainer.progress.step, trainer.budget.max_steps
    if not batches.can_fail:  # files are simply there
        return batches.step(step, last=last)
    batch, failure, silent_until = None, None, time.monotonic() + SILENT_S
    while True:
        try:
            batch = batch or batches.step(step, last=last, patience_s=ROUND_S)
        except UserError as error:
            failure = error
        own = Vote(stops=trainer.stop.is_asked(), waits=batch is None, fails=failure is not None)
        vote = agree(trainer.accelerator, own)
        if vote.fails:
            trainer.save(is_last=True)
            trainer.finish_saving()
            raise failure or UserError("the data of another process has ended; see its message.")
        if not vote.waits:
            return batch
        if vote.stops:
            return None
        if time.monotonic() > silent_until:
            trainer.recorder.say(f"step {step + 1} waits for its stream; Ctrl-C saves and leaves.")
            silent_until = math.inf


def record_step(trainer: Trainer, outcome: StepOutcome, vote: Vote) -> None:
    """Shows the metrics of the step that has just been made, and records them where that is due."""
    recorder, progress, train = trainer.recorder, trainer.progress, trainer.recipe.train
    metrics = outcome.metrics | trainer.batches.accounts(progress.step)
    metrics |= {"tokens_per_s": train.tokens_per_step / vote.seconds, "data/checksum": vote.checksum}
    metrics |= progress.left_out()
    recorder.show(metrics)
    recorder.note_waiting(trainer.batches.waited_s, vote.seconds)
    if trainer.is_due(train.logging_steps):
        recorder.record(metrics)


def follow_up(trainer: Trainer, *, saves: bool = False) -> bool:
    """Evaluates and saves where that is due after a step; at the end of the budget train evaluates.

    Args:
        trainer: whose step it was.
        saves: whether a signal asked to save now.

    Returns:
        False where a signal asked to stop: what is still due is done when the run goes on.
    """
    progress, train = trainer.progress, trainer.recipe.train
    if saves:
        trainer.save()
    found = {} if trainer.is_over else evaluate(trainer)
    if found is None:
        return False
    progress.is_followed_up = True
    is_best = "val/loss" in found and progress.best_step == progress.step
    if trainer.is_due(train.save_steps) or (is_best and train.save_best):
        trainer.save()
    return True


def evaluate(trainer: Trainer) -> Metrics | None:
    """Runs the evaluators that are due, at the end of the budget all of them, and records what they find.

    Returns:
        All that they found; None where a signal asked to stop.

    Raises:
        UserError: where the validation at the end shows that the weights are not sound.
    """
    found: Metrics = {}
    for evaluator in trainer.evaluators:
        if not (trainer.is_over or trainer.is_due(evaluator.every_steps)):
            continue
        metrics = evaluator.run(trainer.model, trainer.accelerator, trainer.is_stopped)
        if metrics is None:
            return None
        if metrics:
            trainer.recorder.record(metrics)
        if summary := evaluator.summary():
            trainer.recorder.say(f"step {trainer.progress.step}: {evaluator.name} {summary}")
        if "val/loss" in metrics:
            judge(trainer, metrics["val/loss"])
        found |= metrics
    return found


def judge(trainer: Trainer, validation_loss: float) -> None:
    """Remembers the best checkpoint; at the end older ones give way to the last, which its validation proves sound.

    Raises:
        UserError: where it does not.
    """
    progress = trainer.progress
    note_validation(progress, validation_loss)
    if not trainer.is_over:
        return
    if not math.isfinite(validation_loss):
        raise give_up(trainer, f"step {progress.step}: the validation loss is {validation_loss}")
    trainer.finish_saving()
    trainer.saver.confirm(progress.step, best_step=progress.best_step)
