"""Checkpoints are read whole: heads of their own are kept, and what lacks, changes or adds a tensor is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import gpt2, gpt2x_like, llama, nanochat, qwen3, random_tokens, small_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from gpt2x import from_stock_config, from_stock_state_dict, save_stock, to_stock_state_dict
from modeling_gpt2x import GPT2XForCausalLM, GPT2XForSequenceClassification, GPT2XModel

STOCK: dict[str, Callable[..., PreTrainedModel]] = {"gpt2": gpt2, "llama": llama, "qwen3": qwen3, "nanochat": nanochat}
HEADS = [*((name, "true") for name in STOCK), ("gpt2", "absent")]


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def with_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    weights = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def with_key(directory: Path, key: str) -> Path:
    """The config's `tie_word_embeddings` true or absent."""
    config = json.loads((directory / "config.json").read_text())
    config["tie_word_embeddings"] = True
    if key == "absent":
        del config["tie_word_embeddings"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def logits(directory: Path, model_class: type, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model_class.from_pretrained(directory).eval()(tokens).logits


@pytest.mark.parametrize(("name", "key"), HEADS)
def test_a_head_that_contradicts_the_config_is_kept_as_the_stock_class_keeps_it(
    name: str, key: str, tmp_path: Path
) -> None:
    directory = with_key(saved(STOCK[name](tie_word_embeddings=False), tmp_path / "stock"), key)
    tokens = random_tokens(2, 9)
    expected = logits(directory, AutoModelForCausalLM, tokens)
    model = GPT2XForCausalLM.from_pretrained(directory).eval()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert model.config.tie_word_embeddings is False
    # Whatever is written says so: another process needs no such luck.
    save_stock(model, tmp_path / "again")
    model.save_pretrained(tmp_path / "own")
    for written, model_class in (("again", AutoModelForCausalLM), ("own", GPT2XForCausalLM)):
        assert json.loads((tmp_path / written / "config.json").read_text())["tie_word_embeddings"] is False
        torch.testing.assert_close(logits(tmp_path / written, model_class, tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STOCK)
def test_a_head_that_is_the_embedding_stays_tied(name: str, tmp_path: Path) -> None:
    stock = STOCK[name](tie_word_embeddings=True)
    table = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    directory = with_tensors(
        saved(stock, tmp_path), lambda weights: weights.update({"lm_head.weight": weights[table].clone()})
    )
    model, tokens = GPT2XForCausalLM.from_pretrained(directory), random_tokens(2, 9)
    torch.testing.assert_close(model(tokens).logits, stock(tokens).logits, rtol=1e-4, atol=1e-5)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_of_gpt2xs_form_keeps_its_own_head_too(tmp_path: Path) -> None:
    model, tokens = gpt2x_like(llama()), random_tokens(2, 9)
    directory = with_key(saved(model, tmp_path), "true")
    loaded = GPT2XForCausalLM.from_pretrained(directory)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.tie_word_embeddings is False


@pytest.mark.parametrize("convert", [to_stock_state_dict, from_stock_state_dict])
def test_a_conversion_drops_no_head_that_differs(convert: Callable) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    weights = {name: torch.randn(61, 32) for name in names}
    config = from_stock_config(llama(tie_word_embeddings=True).config)
    with pytest.raises(
        ValueError, match=r"^lm_head.weight differs from the embedding, but tie_word_embeddings is true"
    ):
        convert(weights, config)
    assert list(convert({names[0]: weights[names[0]], names[1]: weights[names[0]].clone()}, config)) == [names[0]]


def drop(name: str) -> Callable:
    return lambda weights: weights.pop(name)


def put(name: str, *shape: int) -> Callable:
    return lambda weights: weights.update({name: torch.ones(shape)})


Q = "model.layers.1.self_attn.q_proj.weight"
WRONG: dict[str, tuple[Callable, str]] = {
    "missing": (drop(Q), rf"lacks {Q}, which a \w+ model needs; use a complete checkpoint"),
    "no head": (drop("lm_head.weight"), r"lacks lm_head.weight, which a \w+ model needs; use a complete checkpoint"),
    "nothing": (dict.clear, r"lacks lm_head.weight, which a \w+ model needs; use a complete checkpoint"),
    "too many": (
        put("model.layers.1.gate.weight", 3),
        r"holds model.layers.1.gate.weight, which a \w+ model has no pl",
    ),
    "another shape": (put(Q, 3, 3), rf"holds {Q} of the shape \(3, 3\), and by its config it has \(32, 32\); use the"),
}


@pytest.mark.parametrize("form", ["stock", "own"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_of_other_tensors_is_refused_by_name(
    wrong: str, form: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    change, message = WRONG[wrong]
    directory = with_tensors(saved(llama() if form == "stock" else gpt2x_like(llama()), tmp_path), change)
    capfd.readouterr()
    with pytest.raises(ValueError, match=rf"^{tmp_path} {message}") as error:
        GPT2XForCausalLM.from_pretrained(directory)
    assert "\n" not in str(error.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("file", "content"),
    [*(("model.safetensors", content) for content in (b"", b"abc", b"\0" * 4000, None)), ("pytorch_model.bin", b"")],
)
def test_a_damaged_file_is_refused_in_one_line(file: str, content: bytes | None, tmp_path: Path) -> None:
    directory = saved(llama(), tmp_path)
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").unlink()
    (directory / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=rf"^{tmp_path} is damaged \(.+\); get its files again\.$"):
        GPT2XForCausalLM.from_pretrained(directory)


def test_buffers_that_old_versions_saved_are_passed_over(tmp_path: Path) -> None:
    stock, tokens = gpt2(), random_tokens(1, 5)
    buffers = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.1.attn.masked_bias": torch.ones(()),
    }
    directory = with_tensors(saved(stock, tmp_path), lambda weights: weights.update(buffers))
    model = GPT2XForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(model(tokens).logits, stock(tokens).logits, rtol=1e-4, atol=1e-5)
    directory = with_tensors(
        saved(llama(), tmp_path / "llama"), put("model.layers.0.self_attn.rotary_emb.inv_freq", 4)
    )
    GPT2XForCausalLM.from_pretrained(directory)


def test_the_body_and_classifiers_lack_no_more_than_a_head(tmp_path: Path) -> None:
    directory = saved(gpt2x_like(llama()), tmp_path)
    for model_class in (GPT2XModel, GPT2XForSequenceClassification):
        _, loading = model_class.from_pretrained(directory, output_loading_info=True)
        assert loading["missing_keys"] <= {"score.weight"}
    with_tensors(directory, drop(Q))
    for model_class in (GPT2XModel, GPT2XForSequenceClassification):
        with pytest.raises(ValueError, match=r"lacks (model\.)?layers.1.self_attn.q_proj.weight, which a gpt2x model"):
            model_class.from_pretrained(directory)


def test_a_classifier_of_more_classes_takes_a_new_head_where_it_is_asked_for(tmp_path: Path) -> None:
    model = GPT2XForSequenceClassification(small_config(num_labels=2, pad_token_id=0))
    directory = saved(model, tmp_path)
    with pytest.raises(
        ValueError, match=r"holds score.weight of the shape \(2, 32\), and by its config it has \(5, 32"
    ):
        GPT2XForSequenceClassification.from_pretrained(directory, num_labels=5)
    larger = GPT2XForSequenceClassification.from_pretrained(directory, num_labels=5, ignore_mismatched_sizes=True)
    assert larger.score.weight.shape == (5, 32)
    assert torch.equal(larger.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_an_untied_model_made_of_a_tied_one_is_refused_rather_than_given_a_random_head(tmp_path: Path) -> None:
    directory = saved(llama(tie_word_embeddings=True), tmp_path)
    with pytest.raises(ValueError, match=r"lacks lm_head.weight, which a gpt2x model needs"):
        GPT2XForCausalLM.from_pretrained(directory, tie_word_embeddings=False)
