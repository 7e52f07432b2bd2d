"""The stock model that adapters are added to."""

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.config import FinetuneRecipe
from gpt2x.errors import UserError
from gpt2x.locate import find_model, from_pretrained
from gpt2x.models import load_for_inference
from gpt2x.prerequisites import check_adaptable, refuse_adapters
from gpt2x.tokenizers.bpe import adopt_tokenizer, check_tokenizer, vocabulary_size


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
