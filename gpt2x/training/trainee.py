"""What a run trains, and how that is kept: a whole model, or adapters beside one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.config import TrainingRecipe
from gpt2x.distributed.sharding import whole_weights
from gpt2x.models import load_weights, make_model, save_model

Tokenizer: TypeAlias = PreTrainedTokenizerBase
Weights: TypeAlias = Mapping[str, Tensor]


class Trainee(ABC):
    """A model from its making to its last directory."""

    @abstractmethod
    def make(self, tokenizer: Tokenizer) -> PreTrainedModel:
        """The model that the run starts from.

        Raises:
            UserError: where recipe, tokenizer and files contradict each other.
        """

    @abstractmethod
    def weights(self, model: nn.Module, *, is_writer: bool) -> dict[str, Tensor]:
        """What a checkpoint must hold of the model, by name; see gather for the processes of a sharded one."""

    @abstractmethod
    def save(self, model: nn.Module, directory: Path, tokenizer: Tokenizer, *, weights: Weights) -> str:
        """Writes these weights and the tokenizer so that transformers reads them; returns their model_type."""

    @abstractmethod
    def load(self, model: PreTrainedModel, directory: Path) -> None:
        """Reads what save wrote into a model that make has made."""

    def num_saved(self, model: nn.Module) -> tuple[int, int]:
        """How many numbers of the model a checkpoint holds, and how many final/."""
        count = sum(parameter.numel() for parameter in model.parameters())
        return count, count

    def save_final(self, model: nn.Module, directory: Path, tokenizer: Tokenizer, *, weights: Weights) -> str:
        """Writes what the finished run leaves."""
        return self.save(model, directory, tokenizer, weights=weights)


class WholeModel(Trainee):
    """All weights of a GPT2X model, kept as a stock model wherever one expresses it."""

    def __init__(self, recipe: TrainingRecipe) -> None:
        self.recipe = recipe

    def make(self, tokenizer: Tokenizer) -> PreTrainedModel:
        """Random weights, or those of init_from."""
        return make_model(self.recipe, tokenizer)

    def weights(self, model: nn.Module, *, is_writer: bool) -> dict[str, Tensor]:
        """The state dict, whole."""
        return whole_weights(model, is_writer=is_writer)

    def save(self, model: nn.Module, directory: Path, tokenizer: Tokenizer, *, weights: Weights) -> str:
        """A directory for from_pretrained."""
        return save_model(model, directory, tokenizer, weights=weights)

    def load(self, model: PreTrainedModel, directory: Path) -> None:
        """Of a model of the same shape."""
        load_weights(model, directory)
