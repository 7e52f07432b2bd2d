"""transformers from 5.17 to the newest tested: the cache by both of its names, and a word about untried versions."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from stock_models import MODERN, gpt2, gpt2x_like, llama, random_tokens, small_config
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.utils import logging

from modeling_gpt2x import GPT2XForCausalLM, GPT2XForTokenClassification
from modeling_gpt2x.configuration_gpt2x import NEWEST_TESTED, warn_of_untested
from modeling_gpt2x.context_gpt2x import CACHE_NAME, CACHE_NAMES

ROOT = Path(__file__).parents[2]
STOCK = {"gpt2": gpt2, "llama": llama}


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("stock", STOCK)
def test_the_cache_is_taken_by_either_name(stock: str, name: str) -> None:
    stock_model, tokens = STOCK[stock](), random_tokens(2, 9)
    model = gpt2x_like(stock_model)
    with torch.no_grad():
        expected = stock_model(tokens).logits[:, 5:]
        for forward in (model, lambda *args, **kwargs: model.lm_head(model.model(*args, **kwargs)[0])):
            cache = DynamicCache(config=model.config)
            forward(tokens[:, :5], **{name: cache})
            found = forward(tokens[:, 5:], **{name: cache})
            torch.testing.assert_close(getattr(found, "logits", found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generation_goes_on_from_a_cache_by_either_name(name: str) -> None:
    stock, prompt = llama(), random_tokens(1, 6)
    model = gpt2x_like(stock)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = DynamicCache(config=model.config)
    model(prompt[:, :4], **{name: cache})
    assert torch.equal(model.generate(prompt, **{name: cache}, **options), stock.generate(prompt, **options))
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("options", [{}, MODERN])
def test_both_names_at_once_are_refused(options: dict) -> None:
    model, cache = GPT2XForCausalLM(small_config(**options)), DynamicCache()
    with pytest.raises(ValueError, match=r"^past_key_values and cache are two names of one argument; give one of"):
        model(random_tokens(1, 3), past_key_values=cache, cache=cache)


def test_a_classifier_hands_its_cache_on() -> None:
    model, tokens = GPT2XForTokenClassification(small_config()).eval(), random_tokens(2, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :5], **{CACHE_NAME: cache})
        found = model(tokens[:, 5:], **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(found, model(tokens).logits[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_a_cache_under_gradient_checkpointing_is_not_written_twice() -> None:
    model, tokens = GPT2XForCausalLM(small_config()).train(), random_tokens(2, 9)
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(tokens, labels=tokens, past_key_values=DynamicCache(config=model.config)).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("stock", STOCK)
def test_continuous_batching_equals_each_prompt_alone(stock: str) -> None:
    stock_model = STOCK[stock]()
    model, prompts = gpt2x_like(stock_model), [[3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=60, pad_token_id=0)
    expected = [stock_model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :] for p in prompts]
    small = ContinuousBatchingConfig(num_blocks=2, max_batch_tokens=32)
    batch = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    assert [output.generated_tokens for output in batch.values()] == [tokens.tolist() for tokens in expected]


def test_the_newest_tested_version_is_the_one_of_make_test_newest() -> None:
    constraints = (ROOT / "tests" / "constraints-newest.txt").read_text()
    assert re.findall(r"^transformers==(.+)\.\*$", constraints, re.MULTILINE) == [NEWEST_TESTED]
    pinned = re.findall(r"^torch==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert re.findall(r"^torch==.+$", constraints, re.MULTILINE) == pinned


def test_a_transformers_that_nobody_tried_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.get_logger("transformers"), "warning", said.append)
    monkeypatch.setattr("transformers.__version__", "6.1.0.dev0")
    for _ in range(2):  # as two models from the Hub do, each with its own copy of the code
        runpy.run_path(str(ROOT / "modeling_gpt2x" / "configuration_gpt2x.py"))
    assert said == [
        f"GPT2X is tested with transformers up to {NEWEST_TESTED}, and this is 6.1.0.dev0; if a result looks wrong, "
        f"compare it with that of transformers {NEWEST_TESTED}."
    ]


@pytest.mark.parametrize("version", ["5.17.0", "5.24.3", f"{NEWEST_TESTED}.0.dev0"])
def test_a_tested_version_is_not_remarked_upon(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.get_logger("transformers"), "warning_once", said.append)
    warn_of_untested(version)
    assert said == []
    warn_of_untested("99.0.0")
    assert len(said) == 1
