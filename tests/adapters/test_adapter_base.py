"""The stock model that adapters are added to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import LENGTH, SIZES, STOCK, VOCAB_SIZE, adapted, make_tokenizer, recipe, save_stock
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from gpt2x.adapters import load_base, save_adapters
from gpt2x.config import DataSection, ModelSection, Recipe, RunSection, TrainSection
from gpt2x.errors import UserError
from gpt2x.models import make_model, save_model
from gpt2x.tokenizers.bpe import write_tokenizer


def refusal(directory: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        load_base(recipe(directory, **options), tokenizer)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_base_is_the_stock_class_in_float32(stock_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    AutoModelForCausalLM.from_pretrained(stock_dir).to(torch.bfloat16).save_pretrained(stock_dir)
    model = load_base(recipe(stock_dir), tokenizer)
    assert type(model).__name__ in {type(make()).__name__ for make in STOCK.values()}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_final_model_of_a_pretraining_run_is_a_base(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_pretrained_model(tmp_path / "run" / "final", tokenizer)
    model = load_base(recipe(tmp_path / "run"), tokenizer)
    assert (type(model), model.name_or_path) == (GPT2LMHeadModel, str(tmp_path / "run" / "final"))


def save_pretrained_model(directory: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> None:
    """A model as pretraining leaves it: stock where a stock class expresses it, else gpt2x's own form."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": LENGTH}
    pretraining = Recipe(
        run=RunSection(seed=1),
        model=ModelSection(**shape | options),
        data=DataSection(path="nowhere", sequence_length=LENGTH),
        train=TrainSection(max_steps=1),
    )
    save_model(make_model(pretraining, tokenizer), directory, tokenizer)


def test_a_model_without_a_stock_form_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_pretrained_model(tmp_path / "final", tokenizer, position_embedding="rope")
    message = (
        "is of the type gpt2x, and adapters are for the stock forms gpt2, llama, qwen3, nanochat; give one of these"
    )
    assert message in refusal(tmp_path, tokenizer)


def test_a_model_of_another_type_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    MistralForCausalLM(MistralConfig(**SIZES)).save_pretrained(tmp_path)
    assert "is of the type mistral, and adapters are for the stock forms" in refusal(tmp_path, tokenizer)


def test_a_quantized_base_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config_file = save_stock("llama", tmp_path) / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert "is quantized, and adapters are trained beside weights that are not; give" in refusal(
        config_file.parent, tokenizer
    )


def test_adapters_are_no_base(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    directory = save_stock("gpt2", tmp_path)
    save_adapters(adapted(directory), directory, tokenizer)
    assert "holds adapters, not a model; make it one by lora.merge true" in refusal(directory, tokenizer)


def test_a_base_that_is_not_there_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert "no/such/model does not exist" in refusal(Path("no/such/model"), tokenizer)


def test_a_base_that_lacks_weights_is_refused(stock_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = stock_dir / "model.safetensors"
    weights = load_file(file)
    lost = max(name for name in weights if "layers.1" in name or "h.1" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, file, metadata={"format": "pt"})
    assert f"lacks {lost}, which a " in refusal(stock_dir, tokenizer)


def test_a_damaged_base_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    directory = save_stock("gpt2", tmp_path)
    (directory / "model.safetensors").write_bytes(b"torn")
    assert refusal(directory, tokenizer)


def test_a_tokenizer_of_more_tokens_than_the_base_has_rows_is_refused(stock_dir: Path) -> None:
    refused = refusal(stock_dir, make_tokenizer(43))
    assert f"the tokenizer has 43 tokens and init_from ({stock_dir}) {VOCAB_SIZE} rows of embeddings" in refused
    assert "use chat.template tokenization/plain.jinja without chat.special_tokens, or leave lora out" in refused


def test_rows_that_no_token_has_are_left_alone(stock_dir: Path) -> None:
    write_tokenizer(make_tokenizer(38), stock_dir)
    model = load_base(recipe(stock_dir), make_tokenizer(38))
    assert model.get_input_embeddings().weight.shape[0] == VOCAB_SIZE


def test_data_of_another_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    directory = save_stock("gpt2", tmp_path)
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(40)} | {"<eos>": 40}))
    write_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), directory)
    assert "the data's tokenizer is not that of" in refusal(directory, tokenizer)


def test_a_sequence_longer_than_the_bases_positions_is_refused(
    stock_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    message = "data.sequence_length (64) must not exceed the model's max_position_embeddings (32); shorten it."
    assert message in refusal(stock_dir, tokenizer, length=64)
