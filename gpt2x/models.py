"""Models by recipe: made, continued, loaded and saved."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.config import FinetuneRecipe, ModelSection, Recipe, TrainingRecipe
from gpt2x.errors import UserError
from gpt2x.locate import base_of, find_model, find_tokenizer, from_pretrained, holds_tokenizer, one_line_of
from gpt2x.prerequisites import check_installed, refuse_adapters
from gpt2x.stock_forms import save_stock, stock_model_type
from gpt2x.tokenizers.bpe import vocabulary_size, write_tokenizer
from gpt2x.tokenizers.loading import open_tokenizer
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM
from modeling_gpt2x.loading_gpt2x import load_strictly


def make_model(recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model a run starts from: random weights by ``recipe.model``, or the weights of ``recipe.init_from``.

    A model to be fine-tuned grows by the rows of the tokens that the tokenizer has more than the model's own, each the
    mean of the others, and ends its texts where the tokenizer says.

    Raises:
        UserError: where the architecture contradicts itself, the tokenizer or the sequence length.
    """
    torch.manual_seed(recipe.run.seed)
    if recipe.init_from is None:
        assert isinstance(recipe, Recipe)
        try:
            model = GPT2XForCausalLM(make_config(recipe.model, tokenizer))
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from error
    else:
        origin = find_model(recipe.init_from)
        refuse_adapters(origin)
        model = from_pretrained(GPT2XForCausalLM, origin, dtype=torch.float32)
        if isinstance(recipe, FinetuneRecipe):
            check_tokenizer(origin, tokenizer)
            adopt_tokenizer(model, tokenizer)
    _check_fit(recipe, model.config, tokenizer)
    return model


def check_tokenizer(directory: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses data whose ids mean something else to a model; one without a tokenizer is taken at its word.

    Args:
        directory: of the model, or its Hub id.
        tokenizer: the data's, which may have more tokens than the model's own.

    Raises:
        UserError: names a token that differs.
    """
    found = find_tokenizer(directory)
    if not holds_tokenizer(found):
        return
    own = open_tokenizer(found).get_vocab()
    ids = tokenizer.get_vocab()
    differ = [token for token, number in own.items() if ids.get(token) != number]
    if differ:
        differing = min(differ, key=own.__getitem__)
        raise UserError(
            f"the data's tokenizer is not that of {directory}, which has {differing!r} as {own[differing]}, not as "
            f"{ids.get(differing)}; prepare the data again with tokenizer.path {directory}."
        )


def adopt_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a model a row for every token, each new row the mean of the others, and the tokenizer's special tokens.

    Its texts then end at the tokenizer's end of text, and still where they ended before.
    """
    rows, needed = model.config.vocab_size, vocabulary_size(tokenizer)
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
        with torch.no_grad():
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.weight[rows:] = module.weight[:rows].mean(0)  # the same twice where they are tied
    before = model.generation_config.eos_token_id
    others = before if isinstance(before, list) else [before]
    ends = [tokenizer.eos_token_id, *(end for end in others if end not in (None, tokenizer.eos_token_id))]
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id


def make_config(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> GPT2XConfig:
    """GPT2XConfig of a recipe's model section, with the tokenizer's size and special tokens."""
    fields: dict[str, Any] = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    if fields["vocab_size"] is None:
        fields["vocab_size"] = len(tokenizer)
    if fields["rope_parameters"] is None:
        del fields["rope_parameters"]
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GPT2XConfig(**fields, **special)


def _check_fit(recipe: TrainingRecipe, config: GPT2XConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > config.vocab_size and recipe.init_from is not None:
        raise UserError(
            f"init_from ({recipe.init_from}) has {config.vocab_size} token ids, and the data's tokenizer has "
            f"{len(tokenizer)}; prepare the data with tokenizer.path {recipe.init_from}, or give another model."
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"model.vocab_size ({config.vocab_size}) must be at least the tokenizer's {len(tokenizer)} tokens; "
            f"leave it out to take the tokenizer's size."
        )
    if recipe.data.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"data.sequence_length ({recipe.data.sequence_length}) must not exceed the model's "
            f"max_position_embeddings ({config.max_position_embeddings}); shorten it."
        )


def save_model(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> str:
    """Writes model and tokenizer: as a stock transformers model where a class for it exists, else with gpt2x's code.

    Args:
        model: a model of this package.
        directory: where to; created if missing.
        tokenizer: the model's.
        weights: the whole model's, by the names of its state dict, where they are not taken from the model itself.

    Returns:
        The model_type that was written.
    """
    write_tokenizer(tokenizer, directory)
    try:
        written = stock_model_type(model.config)
    except ValueError:
        model.save_pretrained(directory, state_dict=None if weights is None else dict(weights))
        return model.config.model_type
    save_stock(model, directory, state_dict=weights)
    return written


def load_weights(model: PreTrainedModel, directory: Path) -> None:
    """Reads the weights that save_model wrote into a model of the same shape.

    Raises:
        UserError: where the shape is another, or the weights are not whole.
    """
    saved = from_pretrained(GPT2XForCausalLM, directory, dtype=torch.float32)
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"the weights of {directory} do not fit the model of init_from and the data's tokenizer; set these back, "
            f"or start a new run with --run.name NAME."
        ) from error


def load_for_inference(
    name_or_path: str, *, dtype: torch.dtype, device: torch.device | None = None
) -> PreTrainedModel:
    """Any causal language model that transformers loads without remote code, gpt2x's own included.

    Args:
        name_or_path: of a model, or of adapters, which are put on their base; as find_model gives it.
        dtype: of the weights.
        device: where they go; None for the CPU. See compute_device.

    Raises:
        UserError: where it cannot be loaded.
    """
    directory = Path(name_or_path)
    if not (directory / "adapter_config.json").is_file():
        return load_whole(name_or_path, dtype=dtype).to(device).eval()
    check_installed("peft", what=f"{name_or_path} holds adapters, and reading them")
    model = load_whole(base_of(directory), dtype=dtype)
    with one_line_of(name_or_path):
        model.load_adapter(name_or_path)
    return model.to(device).eval()


def load_whole(name_or_path: str, **options: Any) -> PreTrainedModel:
    """A causal language model of which every tensor is in its files.

    Args:
        name_or_path: of a model, as find_model gives it.
        **options: of from_pretrained; with `device_map="meta"` only the headers of the files are read.

    Raises:
        UserError: where it cannot be loaded, lacks a tensor, or holds one that is of another shape or has no place.
    """
    with one_line_of(name_or_path):
        load = AutoModelForCausalLM.from_pretrained
        model, _ = load_strictly(load, name_or_path, trust_remote_code=False, **options)
    return model


def num_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(all parameters, those that take part in matrix products: not embedding tables, unless tied to the head)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings().weight
    tables = {
        id(table): table
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for table in [module.weight]
    }
    lookups = sum(table.numel() for table in tables.values() if table is not head)
    return total, total - lookups


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """Forward and backward FLOPs per token: 6 per weight in a matrix product, and causal attention's half square.

    The formula is PaLM's (arXiv:2204.02311, appendix B) without embedding lookups and with the masked half of the
    attention left out. A frozen weight has no gradient of its own and costs 4.
    """
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * width * sequence_length
    multiplied = num_parameters(model)[1]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 4 * multiplied + 2 * min(trained, multiplied) + attention
