"""Adapters beside a stock model that stays as it is: a run's checkpoints hold the adapters alone."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from gpt2x.adapters import adapter_weights, add_adapters, load_adapters, load_base, save_adapters, save_merged
from gpt2x.config import FinetuneRecipe
from gpt2x.training.trainee import Tokenizer, Trainee, Weights

if TYPE_CHECKING:
    from peft import PeftModel


class Adapters(Trainee):
    """LoRA adapters, kept as peft reads them."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        assert recipe.lora is not None
        self.recipe, self.section = recipe, recipe.lora

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
