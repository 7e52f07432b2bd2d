"""What the training scripts run: the recipes of pretraining and fine-tuning, and how they are written down."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gpt2x.addresses import without_secrets
from gpt2x.config.data import DataSection, PreparationRecipe, TokenizerRecipe
from gpt2x.config.finetuning import LoraSection
from gpt2x.config.hub import HubSection
from gpt2x.config.model import ModelSection
from gpt2x.config.train import EvaluationSection, OptimizerSection, RunSection, TrainSection


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """What every run has, whatever it starts from."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    hub: HubSection = field(default_factory=HubSection)
    init_from: str | None = None
    """Directory or Hub id of a stock or gpt2x model, or a run, to go on from."""
    resume: bool = False
    """Go on with an existing run although its recipe has changed."""

    def __post_init__(self) -> None:
        if self.train.num_train_epochs is not None and any(source.stream for source in self.data.mixture):
            raise ValueError(
                "train.num_train_epochs needs sources of known length, and a stream has none; set train.max_steps or "
                "train.max_tokens instead."
            )
        if self.train.max_time_s is not None and 0 < self.optimizer.warmup_steps < 1:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be a number of steps with "
                f"train.max_time_s, whose clock also runs while the model is compiled; 20 is usual."
            )


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingRecipe):
    """A pretraining run: what scripts/pretrain.py runs."""

    model: ModelSection = field(default_factory=ModelSection)
    init_from: str | None = None
    """Directory or Hub id of a stock or gpt2x model, or a run, to go on from instead of random weights; its shape
    replaces that of model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        length, limit = self.data.sequence_length, self.model.max_position_embeddings
        if self.init_from is None and length > limit:
            raise ValueError(
                f"data.sequence_length ({length}) must not exceed model.max_position_embeddings ({limit}); "
                f"shorten the one or raise the other."
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(TrainingRecipe):
    """A fine-tuning run: what scripts/finetune.py runs."""

    init_from: str = field()  # without the default of every run
    """The model to start from: directory or Hub id of a stock or (without lora) gpt2x model, or the directory of a
    run."""
    lora: LoraSection | None = None
    """Low-rank adapters (arXiv:2106.09685) by peft on the stock class, in place of all weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is not None and self.optimizer.name == "muon":
            raise ValueError(
                "optimizer.name (muon) must be adamw with lora: Muon orthogonalizes the update of a weight, and an "
                "adapter's weight is the product of two matrices."
            )


def to_yaml(recipe: TrainingRecipe | PreparationRecipe | TokenizerRecipe) -> str:
    """The recipe with every field written out, as YAML that parse_recipe reads back to the same recipe.

    Only what opens an address, a password or a signature, is left out.
    """
    return yaml.safe_dump(without_secrets(_plain(dataclasses.asdict(recipe))), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
