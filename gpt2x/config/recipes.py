"""What the scripts run: the recipes of pretraining and generation, and how they are written down."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gpt2x.config.checks import check_positive
from gpt2x.config.data import DataSection, PreparationRecipe, TokenizerRecipe
from gpt2x.config.hub import HubSection
from gpt2x.config.model import ModelSection
from gpt2x.config.train import EvaluationSection, OptimizerSection, RunSection, TrainSection


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A pretraining run: what scripts/pretrain.py runs."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    hub: HubSection = field(default_factory=HubSection)
    init_from: str | None = None
    """Directory or Hub id of a stock model to go on from, instead of random weights; its shape replaces model."""
    resume: bool = False
    """Go on with an existing run although its recipe has changed."""

    def __post_init__(self) -> None:
        length, limit = self.data.sequence_length, self.model.max_position_embeddings
        if self.init_from is None and length > limit:
            raise ValueError(
                f"data.sequence_length ({length}) must not exceed model.max_position_embeddings ({limit}); "
                f"shorten the one or raise the other."
            )
        if self.train.max_time_s is not None and 0 < self.optimizer.warmup_steps < 1:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be a number of steps with "
                f"train.max_time_s, whose clock also runs while the model is compiled; 20 is usual."
            )


@dataclass(frozen=True, kw_only=True)
class GenerationRecipe:
    """Continues text: what scripts/generate.py runs. Without a prompt it asks for one after another."""

    model: str = "runs/quickstart"
    """Directory or Hub id of a model, or the directory of a run."""
    prompt: str | None = None
    """The text to continue; null to ask for prompts until end of input."""
    max_new_tokens: int = 200
    """Length of a continuation in tokens; end of text ends it earlier."""
    temperature: float = 0.8
    """Flattens (above 1) or sharpens (below 1) the distribution; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens are drawn."""
    top_p: float | None = 0.95
    """Only the likeliest tokens that together have this probability are drawn (arXiv:1904.09751)."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already there become less likely (arXiv:1909.05858)."""
    seed: int = 1337
    """The same seed draws the same text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and arithmetic."""

    def __post_init__(self) -> None:
        check_positive("", max_new_tokens=self.max_new_tokens, top_k=self.top_k, top_p=self.top_p)
        check_positive("", repetition_penalty=self.repetition_penalty)
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must not be negative; 0 takes the likeliest token.")


def to_yaml(recipe: Recipe | PreparationRecipe | TokenizerRecipe) -> str:
    """The recipe with every field written out, as YAML that parse_recipe reads back to the same recipe."""
    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
