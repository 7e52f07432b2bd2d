"""The stock model that adapters are added to, and the adapters in its layers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from gpt2x.config import FinetuneRecipe, LoraSection
from gpt2x.distributed.devices import forked_rng
from gpt2x.errors import UserError
from gpt2x.locate import find_model, from_pretrained
from gpt2x.models import adopt_tokenizer, check_tokenizer, load_for_inference
from gpt2x.prerequisites import check_adaptable, check_installed, refuse_adapters
from gpt2x.tokenizers.bpe import vocabulary_size

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR = "all-linear"


def add_adapters(model: PreTrainedModel, section: LoraSection, *, seed: int) -> "PeftModel":
    """Freezes a model and adds adapters in float32, which change nothing until they are trained.

    Args:
        model: the base, as load_base returns it; changed in place.
        section: rank, scale, dropout and places of the adapters.
        seed: of their random half; torch's own random state is left as it was.

    Raises:
        UserError: where peft is not installed, or an adapter has no place in the model.
    """
    check_installed("peft", what="lora")
    from peft import LoraConfig, TaskType, get_peft_model

    targets = _target_modules(model, section.target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in _linear_layers(model).values()),
    )
    with forked_rng(model.device), peft_warnings_ignored():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """Of these none is for the user: peft asks transformers by an old name, and corrects fan_in_fan_out by layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        yield


def _target_modules(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The last parts of the names of the layers that get adapters, sorted.

    Raises:
        UserError: for a name that no linear layer has, and for a head that is the embeddings too.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    linear = {name.rpartition(".")[2] for name in _linear_layers(model)}
    head = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    wanted = set(names or DEFAULTS.get(model.config.model_type, [ALL_LINEAR]))
    if ALL_LINEAR in wanted:
        wanted = wanted - {ALL_LINEAR} | linear
    if model.config.tie_word_embeddings and wanted & head:
        raise UserError(
            f"lora.target_modules ({min(wanted & head)}) must not have the head where it is tied to the embeddings, "
            f"as in {model.name_or_path}; choose from {', '.join(sorted(linear))}."
        )
    unknown = wanted - linear - head
    if unknown:
        raise UserError(
            f"lora.target_modules ({min(unknown)}) must be linear layers of {model.name_or_path}: choose from "
            f"{', '.join(sorted(linear))}, or leave it out."
        )
    return sorted(wanted)


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """By name, without the head."""
    head = model.get_output_embeddings()
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, (nn.Linear, Conv1D)) and module is not head}


def adapter_weights(model: "PeftModel") -> dict[str, Tensor]:
    """The very tensors of the adapters, by their names in adapter_model.safetensors."""
    from peft import get_peft_model_state_dict

    # without False peft asks the Hub whether the base there has as many embeddings
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def load_base(recipe: FinetuneRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The stock model that adapters are added to, in float32; its texts end where the tokenizer says.

    Raises:
        UserError: where it is no whole stock model, or does not fit the tokenizer or the sequence length.
    """
    origin = find_model(recipe.init_from)
    _check_form(origin)
    model = load_for_inference(origin, dtype=torch.float32)
    check_tokenizer(origin, tokenizer)
    _check_fit(recipe, model, tokenizer)
    adopt_tokenizer(model, tokenizer)
    model.loss_type = "ForCausalLM"  # by the name of GPT-2's class transformers finds none, and says so
    return model


def _check_form(origin: str) -> None:
    refuse_adapters(origin)
    config = from_pretrained(AutoConfig, origin)
    check_adaptable(origin, config.model_type)
    if "quantization_config" in config.to_dict():
        raise UserError(
            f"init_from ({origin}) is quantized, and adapters are trained beside weights that are not; give the model "
            f"that it was made from."
        )


def _check_fit(recipe: FinetuneRecipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    needed, rows = vocabulary_size(tokenizer), model.config.vocab_size
    if needed > rows:
        raise UserError(
            f"the tokenizer has {needed} tokens and init_from ({model.name_or_path}) {rows} rows of embeddings, which "
            f"adapters leave as they are; use chat.template tokenization/plain.jinja without chat.special_tokens, or "
            f"leave lora out to train all weights."
        )
    length, limit = recipe.data.sequence_length, model.config.max_position_embeddings
    if length > limit:
        raise UserError(
            f"data.sequence_length ({length}) must not exceed the model's max_position_embeddings ({limit}); "
            f"shorten it."
        )
