"""What scripts/finetune.py runs."""

from dataclasses import dataclass, field
from typing import Annotated

from gpt2x.config.checks import Range, ShareBelowOne, check_numbers
from gpt2x.config.pretrain import TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """Low-rank adapters beside the frozen weights of the stock model."""

    rank: Annotated[int, Range(least=1, most=10**5)] = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Range(above=0, most=10**6)] = 32.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: ShareBelowOne = 0.0
    """Dropout before the adapters."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the linear layers that get one, or all-linear; by default peft's choice for the architecture, or else
    all of them."""
    merge: bool = False
    """Whether final/ is the stock model with the adapters added to its weights, or the adapters alone."""

    def __post_init__(self) -> None:
        check_numbers(self, "lora.")


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
