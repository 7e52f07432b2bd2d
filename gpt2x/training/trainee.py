"""What a run trains, and how that is kept: a whole model, or adapters beside one."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.adapters import adapter_weights, add_adapters, load_adapters, load_base, save_adapters, save_merged
from gpt2x.config import FinetuneRecipe, TrainingRecipe
from gpt2x.distributed.sharding import whole_weights
from gpt2x.models import load_weights, make_model, save_model

if TYPE_CHECKING:
    from peft import PeftModel

Tokenizer: TypeAlias = PreTrainedTokenizerBase
Weights: TypeAlias = Mapping[str, Tensor]


class Trainee:
    """A model from its making to its last directory: all weights of a GPT2X model, kept as a stock model wherever one
    expresses it."""

    def __init__(self, recipe: TrainingRecipe) -> None:
        self.recipe = recipe

    def make(self, tokenizer: Tokenizer) -> PreTrainedModel:
        """The model that the run starts from: random weights, or those of init_from.

        Raises:
            UserError: where recipe, tokenizer and files contradict each other.
        """
        return make_model(self.recipe, tokenizer)

    def weights(self, model: nn.Module, *, is_writer: bool) -> dict[str, Tensor]:
        """What a checkpoint must hold of the model, by name; see gather for the processes of a sharded one."""
        return whole_weights(model, is_writer=is_writer)

    def save(self, model: nn.Module, directory: Path, tokenizer: Tokenizer, *, weights: Weights) -> str:
        """Writes these weights and the tokenizer so that transformers reads them; returns their model_type."""
        return save_model(model, directory, tokenizer, weights=weights)

    def load(self, model: PreTrainedModel, directory: Path) -> None:
        """Reads what save wrote into a model that make has made."""
        load_weights(model, directory)

    def save_final(self, model: nn.Module, directory: Path, tokenizer: Tokenizer, *, weights: Weights) -> str:
        """Writes what the finished run leaves."""
        return self.save(model, directory, tokenizer, weights=weights)

    def num_saved(self, model: nn.Module) -> tuple[int, int]:
        """How many numbers of the model a checkpoint holds, and how many final/."""
        count = sum(parameter.numel() for parameter in model.parameters())
        return count, count


class Adapters(Trainee):
    """LoRA adapters beside a stock model that stays as it is; a run keeps the adapters alone, as peft reads them."""

    recipe: FinetuneRecipe

    def __init__(self, recipe: FinetuneRecipe) -> None:
        assert recipe.lora is not None
        super().__init__(recipe)
        self.section = recipe.lora

    def make(self, tokenizer: Tokenizer) -> PreTrainedModel:
        """The stock model of init_from, frozen, with adapters that change nothing yet."""
        adapted = add_adapters(load_base(self.recipe, tokenizer), self.section, seed=self.recipe.run.seed)
        return cast(PreTrainedModel, adapted)

    def weights(self, model: nn.Module, *, is_writer: bool) -> dict[str, Tensor]:
        """Those of the adapters, by their names in adapter_model.safetensors."""
        return {name: tensor.detach() for name, tensor in adapter_weights(cast("PeftModel", model)).items()}

    def save(self, model: nn.Module, directory: Path, tokenizer: Tokenizer, *, weights: Weights) -> str:
        """A directory for PeftModel.from_pretrained, and for AutoModelForCausalLM where peft is installed."""
        return save_adapters(cast("PeftModel", model), directory, tokenizer, weights=weights)

    def load(self, model: PreTrainedModel, directory: Path) -> None:
        """Adapters of the same shape on the same base."""
        load_adapters(cast("PeftModel", model), directory)

    def num_saved(self, model: nn.Module) -> tuple[int, int]:
        """The adapters', and with lora.merge in the end the whole model's."""
        everything, _ = super().num_saved(model)
        adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return adapters, everything if self.section.merge else adapters

    def save_final(self, model: nn.Module, directory: Path, tokenizer: Tokenizer, *, weights: Weights) -> str:
        """The adapters; with lora.merge the stock model that they make together."""
        if self.section.merge:
            return save_merged(cast("PeftModel", model), directory, tokenizer)
        return self.save(model, directory, tokenizer, weights=weights)


def trainee_of(recipe: TrainingRecipe) -> Trainee:
    """What a recipe trains: adapters where it asks for them."""
    if isinstance(recipe, FinetuneRecipe) and recipe.lora is not None:
        return Adapters(recipe)
    return Trainee(recipe)
