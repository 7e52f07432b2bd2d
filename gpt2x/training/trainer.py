"""The trainer: all that a run works with, where it stands, and the checkpoints that are made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.batches.read_ahead import ReadAhead
from gpt2x.batches.validation import ValidationBatches
from gpt2x.checkpoints.progress import Progress
from gpt2x.checkpoints.saver import CheckpointSaver
from gpt2x.checkpoints.state import State, optimizer_tensors
from gpt2x.config import TrainingRecipe
from gpt2x.distributed.devices import environment_of
from gpt2x.distributed.ranks import Vote, agree, wait_for_main
from gpt2x.distributed.sharding import gather, is_sharded
from gpt2x.runs.changes import plain
from gpt2x.runs.directory import RunDirectory
from gpt2x.training.evaluators import Evaluator
from gpt2x.training.recording import Recorder
from gpt2x.training.schedules import Budget
from gpt2x.training.signals import StopRequest
from gpt2x.training.trainee import Trainee


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """All that a run works with, made once before step 1 by gpt2x.training.start, and where it stands.

    Attributes:
        recipe: what to do.
        run: where to write.
        accelerator: devices, precision and collectives.
        stop: the signals received by this process.
        trainee: how the model is kept.
        model: as ``accelerator.prepare`` returned it.
        optimizers: likewise.
        parameter_names: name of each parameter by its ``id``.
        tokenizer: saved with every model.
        batches: this rank's share of any step.
        validation_batches: this rank's share of the held-out set.
        budget: when to end.
        progress: where the run stands; the only part that changes with every step.
        recorder: takes the metrics.
        evaluators: what is measured of the model, in this order.
        saver: writes the checkpoints.
    """

    recipe: TrainingRecipe
    run: RunDirectory
    accelerator: Accelerator
    stop: StopRequest
    trainee: Trainee
    model: nn.Module
    optimizers: Sequence[Optimizer]
    parameter_names: Mapping[int, str]
    tokenizer: PreTrainedTokenizerBase
    batches: ReadAhead
    validation_batches: ValidationBatches
    budget: Budget
    progress: Progress
    recorder: Recorder
    evaluators: Sequence[Evaluator]
    saver: CheckpointSaver

    @cached_property
    def plain_recipe(self) -> dict[str, Any]:
        """The recipe as config.yaml and every checkpoint have it."""
        return plain(self.recipe)

    @property
    def plain_model(self) -> PreTrainedModel:
        """The transformers model inside what accelerate made of it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent."""
        return self.budget.is_spent(self.progress)

    def is_due(self, every_steps: int | None) -> bool:
        """Whether what is done every so many steps is due after the last one; None for never."""
        return every_steps is not None and self.progress.step % every_steps == 0

    def is_stopped(self) -> bool:
        """Whether any rank was asked to stop; all ranks must ask together."""
        return agree(self.accelerator, Vote(stops=self.stop.is_asked())).stops

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, *, is_last: bool = False) -> None:
        """Has a checkpoint written of where the run stands, unless there is one, once the one before is written; all
        ranks wait for that together. finish_saving waits for this one.

        Args:
            is_last: whether nothing is trained from here on.
        """
        sharded = is_sharded(self.plain_model)
        if self.accelerator.is_main_process:
            self.saver.save(self.whole_state(), is_last=is_last or sharded)  # what was sharded is a copy already
        elif sharded:  # every process has a part of it
            self.whole_state()
        wait_for_main(self.accelerator)

    def save_before_decay(self) -> None:
        """Saves where a warmup-stable-decay schedule is about to decay: from there a larger budget goes on."""
        schedule, progress = self.recipe.optimizer, self.progress
        is_decaying = schedule.lr_scheduler_type == "wsd" and self.budget.decay(progress) > 1 - schedule.decay_ratio
        if is_decaying and progress.decays_to is None:
            self.save()
            progress.decays_to = self.budget.size

    def finish_saving(self) -> None:
        """Waits, on all ranks, until everything is written.

        Raises:
            UserError: where it could not be; on the others, that another one has ended.
        """
        self.saver.wait()
        wait_for_main(self.accelerator)

    def reserve_copies(self) -> None:
        """Gets the memory for copies once there is an optimizer state to copy, where saves come on the way."""
        is_wanted = self.accelerator.is_main_process and self.recipe.train.save_steps is not None
        if is_wanted and not self.saver.is_reserved and not is_sharded(self.plain_model):
            self.saver.reserve(self.whole_state())

    def whole_state(self) -> State:
        """Everything a checkpoint holds, as it is now; of a sharded model all ranks must ask together."""
        scaler, is_writer = self.accelerator.scaler, self.accelerator.is_main_process
        optimizer = optimizer_tensors(self.optimizers, self.parameter_names)
        return State(
            model=self.trainee.weights(self.plain_model, is_writer=is_writer).items(),
            optimizer=gather(optimizer, is_writer=is_writer).items(),
            trainer={
                **asdict(self.progress),  # type: ignore[typeddict-item]
                "optimizer": self.recipe.optimizer.name,
                "scaler": None if scaler is None else scaler.state_dict(),
                "data": self.batches.state(self.progress.step),
                "environment": environment_of(self.accelerator),
                "recipe": self.plain_recipe,
            },
        )
