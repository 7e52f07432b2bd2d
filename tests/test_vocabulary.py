"""A model and the tokenizer of its data."""

import re

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gpt2x import save_stock
from gpt2x.config import DataSection, FinetuneRecipe, TrainSection
from gpt2x.errors import UserError
from gpt2x.models import adopt_tokenizer, make_model, save_model
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
IDS = {str(number): number for number in range(40)} | {"<eos>": 40}


def make_tokenizer(ids=IDS):
    backend = Tokenizer(models.WordLevel(ids, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>", "additional_special_tokens": ["<start>", "<end>"]})
    return tokenizer


def make(*, tied=True, vocab_size=41):
    torch.manual_seed(0)
    return GPT2XForCausalLM(
        GPT2XConfig(**SHAPE, vocab_size=vocab_size, eos_token_id=40, tie_word_embeddings=tied)
    ).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_the_mean_of_the_others_and_the_others_stay(tied):
    model = make(tied=tied)
    embeddings, head = model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()
    adopt_tokenizer(model, chat_tokenizer())
    for before, module in ((embeddings, model.get_input_embeddings()), (head, model.get_output_embeddings())):
        assert torch.equal(module.weight[:41], before)
        torch.testing.assert_close(module.weight[41:], before.mean(0).expand(2, -1))
    assert model.config.vocab_size == 43
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_texts_end_where_the_tokenizer_says_and_where_they_ended_before():
    model, tokenizer = make(), chat_tokenizer()
    adopt_tokenizer(model, tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 40]
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, 40)
    adopt_tokenizer(model, tokenizer)  # again changes nothing
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 40]


def test_a_tokenizer_without_new_tokens_changes_no_weight():
    model = make(vocab_size=64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adopt_tokenizer(model, chat_tokenizer())
    assert model.config.vocab_size == 64
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def finetuning(directory):
    return FinetuneRecipe(
        init_from=str(directory), data=DataSection(path="nowhere", sequence_length=16), train=TrainSection(max_steps=1)
    )


def test_a_fine_tuned_model_starts_as_the_stock_model_with_more_rows(tmp_path):
    save_model(make(), tmp_path, make_tokenizer())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model = make_model(finetuning(tmp_path), chat_tokenizer()).eval()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits[..., :41], stock(ids).logits, atol=1e-5, rtol=0)


def test_ends_of_text_survive_saving_as_a_stock_model(tmp_path):
    model = make()
    adopt_tokenizer(model, chat_tokenizer())
    save_model(model, tmp_path, chat_tokenizer())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.generation_config.eos_token_id == [model.config.eos_token_id, 40]
    assert stock.config.vocab_size == 43


def test_data_of_another_tokenizer_is_refused_with_the_first_token_that_differs(tmp_path):
    save_model(make(), tmp_path, make_tokenizer())
    swapped = IDS | {"3": 4, "4": 3}
    message = (
        f"the data's tokenizer is not that of {tmp_path}, which has '3' as 3, not as 4; prepare the data again with "
        f"tokenizer.path {tmp_path}."
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        make_model(finetuning(tmp_path), make_tokenizer(swapped))


def test_a_run_is_found_by_its_directory(tmp_path):
    save_model(make(), tmp_path / "final", make_tokenizer())
    assert make_model(finetuning(tmp_path), chat_tokenizer()).config.vocab_size == 43


def test_a_model_without_a_tokenizer_is_taken_at_its_word(tmp_path):
    save_stock(make(), tmp_path)
    assert make_model(finetuning(tmp_path), chat_tokenizer()).config.vocab_size == 43
