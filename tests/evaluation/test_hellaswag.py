"""HellaSwag against lm-eval's and llm.c's formulas written out, for every kind of model."""

import json
import math
import threading

import numpy as np
import pytest
import torch
from hellaswag_text import completion_log_probs, lm_eval_log_probs, log_prob, rows, shares
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gpt2x.errors import UserError
from gpt2x.evaluation.continuations import Question, score_continuations, shares_contexts
from gpt2x.evaluation.hellaswag import (
    HellaSwagQuestions,
    encode_items,
    evaluate_hellaswag,
    print_scores,
    result_record,
    score_hellaswag,
)
from gpt2x.evaluation.hellaswag_items import load_hellaswag
from gpt2x.training.cpu_attention import register_chunked_causal
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

SHAPE = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = SHAPE | {"intermediate_size": 48, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
WINDOW = {"sliding_window": 5, "pad_token_id": None}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, initializer_range=0.3)),
    "gpt2x": lambda: GPT2XForCausalLM(GPT2XConfig(**SHAPE, initializer_range=0.3, position_embedding="rope")),
    "gpt2x sliding": lambda: GPT2XForCausalLM(GPT2XConfig(**SHAPE, initializer_range=0.3, **LAYERS)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, num_key_value_heads=1)),
    "qwen3 sliding": lambda: Qwen3ForCausalLM(
        Qwen3Config(**DECODER, num_key_value_heads=1, head_dim=16, use_sliding_window=True, **LAYERS)
    ),
    "mistral sliding": lambda: MistralForCausalLM(MistralConfig(**DECODER, num_key_value_heads=2, **WINDOW)),
    "nanochat": lambda: NanoChatForCausalLM(NanoChatConfig(**DECODER, final_logit_softcapping=3.0)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4)),
}


@pytest.fixture(scope="module")
def bpe():
    """Merges of two letters and more, and a beginning of text as Llama's tokenizers set it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([json.dumps(row) for row in rows()], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>", bos_token="<s>")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    file = tmp_path_factory.mktemp("hellaswag") / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows()) + "\n\n")
    return load_hellaswag(file)


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_gets_the_scores_of_lm_eval(name, bpe, items):
    model = make(name)
    expected, lengths = zip(*(lm_eval_log_probs(model, bpe, row) for row in rows()), strict=True)
    found = evaluate_hellaswag(model, bpe, items, batch_size=3)
    np.testing.assert_allclose(found.log_probs, expected, rtol=1e-5, atol=1e-4)
    assert found.lengths.tolist() == [list(row) for row in lengths]
    assert (found.acc, found.acc_norm) == shares(expected, lengths, [item.label for item in items])


def test_contexts_are_shared_where_a_mask_decides_all_that_a_token_sees():
    question = Question(context=[1, 2, 3], continuations=[[4], [5, 6]])
    longer = Question(context=[1, 2, 3], continuations=[[4], [5, 6, 7]])
    none, windows = {"bloom", "mamba"}, {"gpt2x sliding", "qwen3 sliding", "mistral sliding"}
    assert {name for name in MODELS if not shares_contexts(make(name), [question])} == none
    assert {name for name in MODELS if not shares_contexts(make(name), [question, longer])} == none | windows


# of contexts and continuations that have one, two, three and five parts, some of them of no token that is read
LENGTHS = [(5, [4]), (1, [1, 5]), (7, [3, 7, 2]), (2, [1, 1, 4, 1, 3]), (3, [1, 1])]


@pytest.mark.parametrize("name", MODELS)
def test_questions_of_one_pass_do_not_see_each_other_nor_do_continuations(name):
    model, draw = make(name), np.random.default_rng(0)
    questions = [
        Question(
            context=draw.integers(300, size=context).tolist(),
            continuations=[draw.integers(300, size=length).tolist() for length in lengths],
        )
        for context, lengths in LENGTHS
    ]
    for question, found in zip(questions, score_continuations(model, questions, batch_size=5), strict=True):
        expected = [log_prob(model, question.context, ids, 10_000) for ids in question.continuations]
        assert found.log_probs.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_continuation_is_greedy_where_each_of_its_tokens_is_the_likeliest(name):
    model, context = make(name), [5, 9, 2, 7]
    with torch.no_grad():
        first, last = (model(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in (context, [*context, 8]))
    greedy = [int(first.argmax())]
    others = [[8, int(last.argmax())], [int(first.argmin())], greedy]
    (found,) = score_continuations(model, [Question(context=context, continuations=[greedy, *others])], batch_size=1)
    assert found.is_greedy.tolist() == [True, greedy == [8], False, True]
    expected = first.double().log_softmax(-1)
    assert found.log_probs[[0, 2]].tolist() == pytest.approx(
        [expected[greedy[0]].item(), expected[others[1][0]].item()], rel=1e-5
    )


def test_the_completion_style_gets_the_scores_of_llm_c(model, tokenizer, items):
    model.eval()
    # One token per byte, hence a longer model.
    torch.manual_seed(0)
    model = GPT2XForCausalLM(GPT2XConfig(**SHAPE, initializer_range=0.3))
    expected, lengths = zip(*(completion_log_probs(model, tokenizer, row) for row in rows()), strict=True)
    found = evaluate_hellaswag(model, tokenizer, items, style="hellaswag_completion")
    np.testing.assert_allclose(found.log_probs, expected, rtol=1e-5, atol=1e-4)
    assert (found.acc, found.acc_norm) == shares(expected, lengths, [item.label for item in items])
    assert found.name == "hellaswag_completion_20_items"


def test_a_context_too_long_for_the_model_loses_its_beginning(model, tokenizer, items):
    """The model takes 64 tokens; some contexts and endings have more bytes, some items only with some endings."""
    model.eval()
    expected = [lm_eval_log_probs(model, tokenizer, row, limit=64)[0] for row in rows()]
    questions = encode_items(tokenizer, items, "hellaswag")
    fits = [[len(q.context) + len(ids) - 1 <= 64 for ids in q.continuations] for q in questions]
    assert {all(of_item) for of_item in fits} == {any(of_item) for of_item in fits} == {True, False}
    found = evaluate_hellaswag(model, tokenizer, items)
    np.testing.assert_allclose(found.log_probs, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_scores_do_not_depend_on_the_batch_size(batch_size, bpe, items):
    model = make("gpt2")
    expected = evaluate_hellaswag(model, bpe, items, batch_size=4)
    found = evaluate_hellaswag(model, bpe, items, batch_size=batch_size)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-4)


def test_the_standard_error_is_that_of_the_items(bpe, items):
    found = evaluate_hellaswag(make("gpt2"), bpe, items)
    hits = [float(row.argmax() == item.label) for row, item in zip(found.log_probs, items, strict=True)]
    assert 0 < found.acc < 1
    assert found.acc_stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))


def test_bfloat16_sums_its_softmax_in_float32(bpe, items):
    model = make("llama").to(torch.bfloat16)
    expected = [lm_eval_log_probs(model, bpe, row)[0] for row in rows()]
    np.testing.assert_allclose(evaluate_hellaswag(model, bpe, items).log_probs, expected, rtol=0.02, atol=1.0)


def test_the_model_is_left_as_it_was(bpe, items):
    model = make("gpt2").train()
    model.set_attn_implementation("eager")
    evaluate_hellaswag(model, bpe, items)
    assert model.training
    assert model.config._attn_implementation == "eager"


def test_the_attention_of_a_training_gives_way_to_one_that_takes_the_mask(bpe, items):
    model = make("gpt2x")
    expected = evaluate_hellaswag(model, bpe, items).log_probs
    model.set_attn_implementation(register_chunked_causal())
    np.testing.assert_allclose(evaluate_hellaswag(model, bpe, items).log_probs, expected, rtol=1e-6)
    assert model.config._attn_implementation == "chunked_causal"


def test_an_ending_longer_than_the_model_is_refused(model):
    question = Question(context=[1], continuations=[[2], [3] * 65])
    questions = HellaSwagQuestions(style="hellaswag", questions=[question], lengths=np.ones((1, 2)), labels=[0])
    line = (
        "an ending of the HellaSwag items has 65 tokens, and the model takes 64; give items with shorter endings, or "
    )
    with pytest.raises(UserError, match=line):
        score_hellaswag(model, questions)


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_cores_that_take_passes_of_their_own_find_the_same_and_get_all_cores_back(cores, bpe, items):
    model, before = make("gpt2"), torch.get_num_threads()
    expected = evaluate_hellaswag(model, bpe, items, batch_size=100).log_probs
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append((threading.get_ident(), torch.get_num_threads())))
    torch.set_num_threads(cores)
    try:
        found = evaluate_hellaswag(model, bpe, items, batch_size=3).log_probs
        assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert len(seen) == 7
    assert {threads for _, threads in seen} == {1}
    assert (threading.get_ident() in {thread for thread, _ in seen}) == (cores == 1)


def test_what_fails_in_a_pass_fails_here(bpe, items):
    model, before = make("gpt2"), torch.get_num_threads()

    def fails(*_):
        raise ValueError("the pass")

    model.register_forward_pre_hook(fails)
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="the pass"):
            evaluate_hellaswag(model, bpe, items, batch_size=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_accelerator_alone_changes_nothing(accelerator, bpe, items):
    model = make("llama")
    expected = evaluate_hellaswag(model, bpe, items)
    found = evaluate_hellaswag(accelerator.prepare(model), bpe, items, accelerator=accelerator)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-6)


def test_the_record_names_the_number_of_items_and_the_precision(bpe, items):
    found = evaluate_hellaswag(make("gpt2"), bpe, items)
    fields = ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr")
    assert found.metrics() == {f"hellaswag/{field}": getattr(found, field) for field in fields} | {
        "hellaswag/items": 20
    }
    assert result_record("float32", found)[0] == "hellaswag_20_items"
    assert result_record("int8", found)[0] == "hellaswag_20_items_int8"


def test_a_single_item_has_no_standard_error(bpe, items):
    found = evaluate_hellaswag(make("gpt2"), bpe, items[:1])
    assert math.isnan(found.acc_stderr)
    assert result_record("float32", found)[1]["acc_stderr"] is None


def test_the_table_shows_what_another_precision_changes(bpe, items, capsys):
    found = evaluate_hellaswag(make("gpt2"), bpe, items)
    print_scores({"float32": found, "int8": found}, {"float32": 4_000_000, "int8": 1_000_000})
    printed = capsys.readouterr().out
    assert printed.startswith("hellaswag_20_items: 20 items, zero-shot\n")
    assert "+0.0000" in printed
    assert "the same ending in 100.0% of the items" in printed
