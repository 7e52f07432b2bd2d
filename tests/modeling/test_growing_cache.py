"""A cache that grows in place holds what a concatenating one holds, whatever is done to it on the way."""

import pytest
import torch
from transformers import DynamicCache

from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM
from modeling_gpt2x.cache_gpt2x import MIN_ROOM, GrowingLayer, grow_in_place

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
