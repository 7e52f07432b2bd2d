"""Logits of chosen tokens are those of the whole pass."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    NanoChatConfig,
    NanoChatForCausalLM,
)

from gpt2x.errors import UserError
from gpt2x.evaluation.selected_logits import selected_logits, selective_head
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

DECODER = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "gpt2x": lambda: GPT2XForCausalLM(GPT2XConfig(**DECODER, initializer_range=0.3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, **IDS)),
    "nanochat": lambda: NanoChatForCausalLM(NanoChatConfig(**DECODER, **IDS, final_logit_softcapping=0.1)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=2)),
}


@torch.no_grad()
@pytest.mark.parametrize("at_a_time", [1, 3, 7, 50, None])
@pytest.mark.parametrize("name", MODELS)
def test_a_few_at_a_time_they_are_those_of_the_whole_pass(name, at_a_time):
    torch.manual_seed(0)
    model, ids = MODELS[name]().eval(), torch.randint(60, (3, 10))
    places = torch.tensor([29, 0, 0, 14, 3, 22, 8])
    expected = model(input_ids=ids).logits.flatten(0, 1)[places]
    with selective_head(model):
        chunks = list(selected_logits(model, {"input_ids": ids}, places, at_a_time=at_a_time))
        again = list(selected_logits(model, {"input_ids": ids}, places, at_a_time=at_a_time))
    step = at_a_time or 7
    assert [len(chunk) for chunk in chunks] == [len(chunk) for chunk in places.split(step)]
    torch.testing.assert_close(torch.cat(chunks), expected)
    assert all(map(torch.equal, chunks, again))
    torch.testing.assert_close(model(input_ids=ids).logits.flatten(0, 1)[places], expected, rtol=0, atol=0)


def test_the_layers_compute_once_and_keep_the_forward_pass_that_others_gave_them():
    model, passes = MODELS["gpt2x"]().eval(), []
    given = model.base_model.forward

    def counting(*args, **kwargs):
        passes.append(1)
        return given(*args, **kwargs)

    model.base_model.forward = counting
    with selective_head(model):
        inputs, places = {"input_ids": torch.arange(9)[None]}, torch.arange(9)
        assert len(list(selected_logits(model, inputs, places, at_a_time=2))) == 5
    assert len(passes) == 1
    assert model.base_model.forward is counting


def test_a_model_of_one_piece_is_refused():
    line = "GPT2XModel has no module of its layers without the head; score it by lm-eval"
    with pytest.raises(UserError, match=line), selective_head(MODELS["gpt2x"]().model):
        pass
