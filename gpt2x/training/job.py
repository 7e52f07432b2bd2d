"""A job: everything that a run works with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.batches.read_ahead import ReadAhead
from gpt2x.batches.validation import ValidationBatches
from gpt2x.checkpoints.saver import CheckpointSaver
from gpt2x.config import TrainingRecipe
from gpt2x.runs.changes import plain
from gpt2x.runs.directory import RunDirectory
from gpt2x.training.budget import Budget
from gpt2x.training.failures import Failures
from gpt2x.training.hellaswag import RunHellaSwag
from gpt2x.training.trainee import Trainee


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run works with, made once before step 1.

    Attributes:
        recipe: what to do.
        run: where to write.
        accelerator: devices, precision and collectives.
        trainee: how the model is kept.
        model: as ``accelerator.prepare`` returned it.
        optimizers: likewise.
        parameter_names: name of each parameter by its ``id``.
        tokenizer: for samples, and saved with every model.
        batches: this rank's share of any step.
        validation_batches: this rank's share of the held-out set.
        prompts: what the samples continue.
        budget: when to end.
        saver: writes the checkpoints.
        hellaswag: the items that are scored beside every validation; None for none.
        failures: what has failed without ending the run.
    """

    recipe: TrainingRecipe
    run: RunDirectory
    accelerator: Accelerator
    trainee: Trainee
    model: nn.Module
    optimizers: Sequence[Optimizer]
    parameter_names: Mapping[int, str]
    tokenizer: PreTrainedTokenizerBase
    batches: ReadAhead
    validation_batches: ValidationBatches
    prompts: Sequence[str]
    budget: Budget
    saver: CheckpointSaver
    hellaswag: RunHellaSwag | None = None
    failures: Failures = field(default_factory=Failures)

    @cached_property
    def plain_recipe(self) -> dict[str, Any]:
        """The recipe as config.yaml and every checkpoint have it."""
        return plain(self.recipe)

    @property
    def plain_model(self) -> PreTrainedModel:
        """The transformers model inside what accelerate made of it."""
        return self.accelerator.unwrap_model(self.model)
