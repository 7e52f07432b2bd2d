"""Samples are repeatable, and nobody notices that they were drawn."""

import pytest
import torch

from gpt2x.config import GenerationRecipe
from gpt2x.evaluation.samples import sample_texts, stream_text

PROMPTS = ["def f(x):", "été", ""]


def sample(model, tokenizer, **changes):
    return sample_texts(model, tokenizer, PROMPTS, **{"max_new_tokens": 8, "seed": 1} | changes)


def test_every_prompt_is_continued_without_being_repeated(model, tokenizer):
    texts = sample(model, tokenizer)
    assert len(texts) == 3
    assert not any(text.startswith(prompt) for prompt, text in zip(PROMPTS[:2], texts))


def test_the_same_seed_draws_the_same_texts_and_another_others(model, tokenizer):
    assert sample(model, tokenizer) == sample(model, tokenizer)
    assert sample(model, tokenizer, seed=2) != sample(model, tokenizer)


def test_the_random_state_of_the_training_is_left_as_it_was(model, tokenizer):
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    sample(model, tokenizer)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("is_training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(model, tokenizer, is_training):
    model.train(is_training)
    sample(model, tokenizer)
    assert model.training == is_training


def test_a_prompt_longer_than_the_model_keeps_its_end(model, tokenizer):
    long = "x" * 500 + "the end of the prompt"
    kept = long[-(64 - 8) :]
    texts = [sample_texts(model, tokenizer, [prompt], max_new_tokens=8, seed=1) for prompt in (long, kept)]
    assert texts[0] == texts[1]


def test_a_continuation_longer_than_the_model_is_shortened_and_half_of_the_prompt_kept(model, tokenizer):
    long = "x" * 500 + "the end of this prompt, which is half"
    texts = [
        sample_texts(model, tokenizer, [prompt], max_new_tokens=length, seed=1)
        for prompt, length in ((long, 1000), (long[-32:], 32))
    ]
    assert texts[0] == texts[1]


def greedy(model, tokenizer, prompt, length):
    """The likeliest token again and again, each from a whole forward pass."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_temperature_zero_streams_the_likeliest_tokens(model, tokenizer, capsys):
    model.eval()
    stream_text(model, tokenizer, "def f", GenerationRecipe(temperature=0, max_new_tokens=12))
    assert capsys.readouterr().out == greedy(model, tokenizer, "def f", 12) + "\n"


def test_only_the_likeliest_of_one_is_greedy_as_well(model, tokenizer, capsys):
    model.eval()
    for options in (GenerationRecipe(temperature=0, max_new_tokens=12), GenerationRecipe(top_k=1, max_new_tokens=12)):
        stream_text(model, tokenizer, "def f", options)
    first, second = capsys.readouterr().out.split("\n")[:2]
    assert first == second


def test_what_was_written_before_is_repeated_less_with_a_penalty(model, tokenizer, capsys):
    model.eval()
    for penalty in (1.0, 50.0):
        stream_text(
            model, tokenizer, "aaaa", GenerationRecipe(temperature=0, max_new_tokens=20, repetition_penalty=penalty)
        )
    plain, penalized = (tokenizer(text)["input_ids"] for text in capsys.readouterr().out.split("\n")[:2])
    assert len(set(penalized)) / len(penalized) > len(set(plain)) / len(plain)
