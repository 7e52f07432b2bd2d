"""A cache that grows in place holds what a concatenating one holds, whatever is done to it on the way."""

import copy
import pickle

import pytest
import torch
from stock_models import STOCK_MODELS, gpt2x_like, random_tokens
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM
from modeling_gpt2x.context_gpt2x import MIN_ROOM, GrowingLayer, grow_in_place

LAYERS, ROWS, HEADS, WIDTH = 2, 3, 2, 4


@pytest.fixture
def caches():
    """One that concatenates, one that grows."""
    growing = DynamicCache()
    growing.layers = [GrowingLayer() for _ in range(LAYERS)]
    plain = DynamicCache()
    return plain, growing


def append(caches, num_tokens, rows=ROWS):
    new = torch.randn(2, LAYERS, rows, HEADS, num_tokens, WIDTH)
    for layer in range(LAYERS):
        expected, found = (cache.update(new[0, layer], new[1, layer], layer) for cache in caches)
        assert all(torch.equal(*pair) for pair in zip(expected, found))


def test_what_is_appended_is_there_through_many_buffers(caches):
    for num_tokens in (5, 1, 1, MIN_ROOM, 1, 3 * MIN_ROOM, 1, 1):
        append(caches, num_tokens)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_a_step_writes_its_own_tokens_and_copies_nothing(caches):
    append(caches, 5)
    keys = caches[1].layers[0].keys
    append(caches, 1)
    assert caches[1].layers[0].keys.data_ptr() == keys.data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0, 1])),
    ],
    ids=["crop", "reorder", "select"],
)
def test_what_is_done_to_the_cache_between_steps_is_seen(caches, change):
    append(caches, 7)
    for cache in caches:
        change(cache)
    append(caches, 1)
    append(caches, 2)


def test_other_rows_get_another_buffer(caches):
    append(caches, 7)
    for cache in caches:
        cache.batch_repeat_interleave(2)
    append(caches, 1, rows=2 * ROWS)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([4]))
    append(caches, 1, rows=1)


def test_only_plain_layers_of_a_plain_cache_grow():
    config = GPT2XConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"], sliding_window=8)
    cache = DynamicCache(config=config)
    grow_in_place(cache)
    assert [type(layer).__name__ for layer in cache.layers] == ["GrowingLayer", "DynamicSlidingWindowLayer"]
    offloading = DynamicCache(config=config, offloading=True)
    grow_in_place(offloading)
    assert type(offloading.layers[0]).__name__ == "DynamicLayer"


def test_generate_uses_it_unless_it_is_given_a_cache():
    model = GPT2XForCausalLM(GPT2XConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    prompt = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    own = model.generate(prompt, **options)
    given = model.generate(prompt, past_key_values=DynamicCache(config=model.config), **options)
    assert {type(layer) for layer in own.past_key_values.layers} == {GrowingLayer}
    assert GrowingLayer not in {type(layer) for layer in given.past_key_values.layers}
    assert torch.equal(own.sequences, given.sequences)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_a_plain_layer_that_goes_on_by_itself(caches, copied):
    append(caches, 3)
    for plain, growing in zip(*(cache.layers for cache in caches)):
        copy_of_plain, copy_of_growing = copied(plain), copied(growing)
        assert type(copy_of_growing) is DynamicLayer
        assert vars(copy_of_growing).keys() == vars(copy_of_plain).keys()
        assert copy_of_growing.keys.is_contiguous()
        growing.keys.zero_()  # shares nothing with the copy
        new = torch.randn(2, ROWS, HEADS, 1, WIDTH)
        for expected, found in zip(copy_of_plain.update(*new), copy_of_growing.update(*new)):
            assert torch.equal(expected, found)


def test_a_copy_of_what_holds_nothing_yet_takes_the_first_tokens():
    layer = copy.deepcopy(GrowingLayer())
    new = torch.randn(2, ROWS, HEADS, 2, WIDTH)
    assert type(layer) is DynamicLayer
    assert all(torch.equal(*pair) for pair in zip(layer.update(*new), new))


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_a_cached_step_compiles_into_one_graph(name):
    stock, tokens = STOCK_MODELS[name](), random_tokens(2, 9)
    model = gpt2x_like(stock)
    cache = DynamicCache(config=model.config)
    grow_in_place(cache)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = stock(tokens).logits
        found = [model(tokens[:, :5], past_key_values=cache).logits]
        for position in range(5, 7):
            found.append(step(tokens[:, position : position + 1], past_key_values=cache).logits)
        found.append(model(tokens[:, 7:], past_key_values=cache).logits)  # and on without the compiler
    assert {type(layer) for layer in cache.layers} == {GrowingLayer}
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-5)
