"""Generation in every manner of transformers, against plain loops without a cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stock_models import MODERN, random_tokens, small_config
from transformers import (
    DynamicCache,
    PreTrainedTokenizerFast,
    QuantizedCache,
    StaticCache,
    pipeline,
)
from transformers.utils import is_optimum_quanto_available

from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": MODERN,
    "sliding": {**MODERN, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
}
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}


def build(name: str, **options: Any) -> GPT2XForCausalLM:
    """A model whose weights are far enough from zero to have clear favourites."""
    torch.manual_seed(3)
    model = GPT2XForCausalLM(small_config(**CONFIGS[name], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@torch.no_grad()
def continued(model: GPT2XForCausalLM, prompt: torch.Tensor, choose: Callable, count: int = 12) -> torch.Tensor:
    """`count` tokens, each by `choose` from the logits of a whole forward pass over all before."""
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat((tokens, choose(model(tokens, use_cache=False).logits[:, -1])), dim=1)
    return tokens


def greediest(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1, keepdim=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_search_equals_a_loop_without_cache(name: str, kind: str, attention: str) -> None:
    model, prompt = build(name), random_tokens(2, 7)
    model.set_attn_implementation(attention)
    cache = {"use_cache": False} if kind == "none" else {"cache_implementation": kind}
    generated = model.generate(prompt, do_sample=False, **cache, **OPTIONS)
    assert torch.equal(generated, continued(model, prompt, greediest))


@pytest.mark.parametrize("name", CONFIGS)
def test_sampling_draws_from_the_same_distribution_as_a_loop(name: str) -> None:
    model, prompt = build(name), random_tokens(2, 7)
    torch.manual_seed(5)
    generated = model.generate(prompt, do_sample=True, temperature=0.7, top_k=0, top_p=1.0, **OPTIONS)
    torch.manual_seed(5)
    expected = continued(model, prompt, lambda logits: torch.multinomial((logits / 0.7).softmax(-1), 1))
    assert torch.equal(generated, expected)


@torch.no_grad()
def best_of_all(model: GPT2XForCausalLM, prompt: torch.Tensor, *, beams: int, steps: int) -> torch.Tensor:
    """Beam search written out: the `beams` likeliest continuations, step by step, and the best at the end."""
    candidates = [(prompt, 0.0)]
    for _ in range(steps):
        longer = []
        for tokens, score in candidates:
            log_p = model(tokens, use_cache=False).logits[0, -1].log_softmax(-1)
            for p, token in zip(*log_p.topk(2 * beams)):
                longer.append((torch.cat((tokens, token.view(1, 1)), dim=1), score + p.item()))
        candidates = sorted(longer, key=lambda found: -found[1])[:beams]
    return candidates[0][0]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_beam_search_equals_one_written_out(name: str, use_cache: bool) -> None:
    model, prompt = build(name), random_tokens(1, 7)
    options = {**OPTIONS, "max_new_tokens": 6}
    generated = model.generate(prompt, num_beams=3, do_sample=False, use_cache=use_cache, **options)
    assert torch.equal(generated, best_of_all(model, prompt, beams=3, steps=6))


@pytest.mark.parametrize("helper", ["prompt lookup", "draft model"])
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_assisted_generation_equals_greedy_search(name: str, helper: str) -> None:
    model, prompt = build(name), torch.cat([random_tokens(1, 4)] * 3, dim=1)
    draft = build(name, num_hidden_layers=1)
    assistance = {"prompt_lookup_num_tokens": 3} if helper == "prompt lookup" else {"assistant_model": draft}
    for assistant in (assistance, {"assistant_model": model}):  # a draft that is always right crops nothing
        generated = model.generate(prompt, do_sample=False, **assistant, **OPTIONS)
        assert torch.equal(generated, continued(model, prompt, greediest))


@pytest.mark.parametrize("kind", ["dynamic", "static", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_left_padded_batches_equal_each_prompt_alone(name: str, kind: str) -> None:
    model, prompts = build(name), [random_tokens(1, length) for length in (3, 8, 5)]
    batch = torch.cat([torch.nn.functional.pad(prompt, (8 - prompt.shape[1], 0)) for prompt in prompts])
    cache = {"use_cache": False} if kind == "none" else {"cache_implementation": kind}
    generated = model.generate(batch, attention_mask=(batch != 0).long(), do_sample=False, **cache, **OPTIONS)
    for row, prompt in zip(generated, prompts):
        assert torch.equal(row[8:], continued(model, prompt, greediest)[0, prompt.shape[1] :])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_right_padding_changes_no_logits(name: str, kind: str) -> None:
    model, prompt = build(name), random_tokens(1, 6)
    padded, mask = torch.nn.functional.pad(prompt, (0, 3)), torch.tensor([[1] * 6 + [0] * 3])
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=12)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(logits[:, :6], model(prompt).logits, rtol=1e-5, atol=1e-5)
        # Behind the padding the text goes on, with the positions of its tokens.
        token, mask = random_tokens(1, 1), torch.tensor([[1] * 6 + [0] * 3 + [1]])
        inputs = {"attention_mask": mask, "position_ids": torch.tensor([[6]]), "past_key_values": cache}
        logits = model(token, **inputs).logits
        expected = model(torch.cat((prompt, token), dim=1)).logits[:, -1:]
    if name != "sliding":  # a window counts padding, here as in transformers
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_sliding_layer_of_a_cache_holds_its_window_only() -> None:
    model = build("sliding")
    cache = DynamicCache(config=model.config)
    model.generate(random_tokens(1, 9), past_key_values=cache, do_sample=False, **OPTIONS)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [4, 20]  # the window's fifth is the token that comes


@pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto, a QuantizedCache backend, is missing")
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_a_quantized_cache_generates_nearly_the_same(name: str) -> None:
    model, prompt = build(name), random_tokens(1, 40)
    cache = QuantizedCache("quanto", model.config, nbits=4, residual_length=8, q_group_size=8)
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache)
        logits = model(prompt[:, -1:], past_key_values=cache).logits[0, -1]
        expected = model(prompt).logits[0, -1]
    assert torch.cosine_similarity(logits, expected, dim=0) > 0.98
    assert not torch.equal(logits, expected)


def test_logits_to_keep_takes_counts_and_indices() -> None:
    model, tokens = build("modern"), random_tokens(2, 8)
    everything = model(tokens).logits
    indices = torch.tensor([1, 4, 7])
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, everything[:, -2:])
    torch.testing.assert_close(model(tokens, logits_to_keep=indices).logits, everything[:, indices])


def test_generation_computes_the_last_logits_of_the_prompt_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = build("gpt2"), []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: lengths.append(inputs[0].shape[1]))
    model.generate(random_tokens(1, 9), do_sample=False, **OPTIONS)
    assert lengths == [1] * 12


def test_the_attention_can_be_switched_at_run_time() -> None:
    model, tokens = build("modern"), random_tokens(1, 8)
    expected = model(tokens).logits
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation("eager")
    attentions = model(tokens, output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(1, 4, 8, 8)] * 2
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(1, 4, 8))


def test_the_pipeline_continues_text() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0")
    model = build("modern")
    expected = continued(model, torch.tensor([[5, 6, 7]]), greediest, count=4)[0, 3:]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    model.generation_config.eos_token_id = None
    [continuation] = generator("w5 w6 w7", max_new_tokens=4, do_sample=False, return_full_text=False)
    assert continuation["generated_text"].split() == [f"w{i}" for i in expected.tolist()]


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_training_steps_compile_into_one_graph_once(name: str) -> None:
    model, tokens = build(name).train(), [random_tokens(2, 16) for _ in range(4)]
    losses, gradients = [], []
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for forward in (model, compiled):
            for batch in tokens:
                model.zero_grad()
                loss = forward(batch, labels=batch, return_logits=False).loss
                loss.backward()
                losses.append(loss.item())
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-5)
    for eager, by_compiler in zip(*gradients):
        torch.testing.assert_close(by_compiler, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_torch_export_keeps_the_numbers(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 9)
    program = torch.export.export(model, (tokens,), {"attention_mask": torch.ones_like(tokens), "use_cache": False})
    exported = program.module()(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    torch.testing.assert_close(exported.logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, MODERN, {**MODERN, "gated_mlp": False, "qk_norm": "weightless"}])
def test_the_parallel_plans_name_modules_that_exist(options: dict) -> None:
    model = GPT2XForCausalLM(GPT2XConfig(**{**small_config().to_dict(), **options}))
    modules = {name for name, _ in model.named_modules()}
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    for plan in (model.tp_plan, model.pp_plan, model.fsdp_plan):
        assert len(plan) > 1
        missing = [name for name in plan if name.replace("*", "0") not in modules]
        assert missing == []
    split = {name.split(".")[-1] for name in model.tp_plan} | {"weight", "embed_tokens", "norm", "lm_head"}
    linear = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear <= split
