"""No script runs code that lies beside a model or a tokenizer, and none asks whether it may."""

import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gpt2x.config import DataSection, FinetuneRecipe, LoraSection, ModelSection, Recipe, TokenizerSection, TrainSection
from gpt2x.errors import UserError
from gpt2x.models import load_for_inference, make_model, save_model
from gpt2x.tokenizers.bpe import load_tokenizer
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

ROOT = Path(__file__).parents[2]
SHAPE = {"vocab_size": 41, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"max_position_embeddings": 64}
UNKNOWN = "model_type ('stranger') must be gpt2x or one of gpt2, llama, qwen3, nanochat, which GPT2X converts"
REFUSED = "brings code of its own, which gpt2x never runs"


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({str(number): number for number in range(40)} | {"<eos>": 40}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def marker(tmp_path):
    """What the code of a stranger would write."""
    return tmp_path / "it-ran"


@pytest.fixture
def code(marker):
    return f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"


@pytest.fixture(autouse=True)
def _who_would_say_yes(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))


@pytest.fixture
def foreign(tmp_path, tokenizer, code):
    """A whole model of a type that only its own code knows."""
    directory = tmp_path / "foreign"
    config = LlamaConfig(**SHAPE, intermediate_size=64, eos_token_id=40)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(directory)
    content = json.loads((directory / "config.json").read_text())
    content |= {"model_type": "stranger", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (directory / "config.json").write_text(json.dumps(content))
    (directory / "own.py").write_text(code)
    return directory


def run(script, *arguments, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    for name in ("stdout", "stderr"):  # which a script replaces by streams of its own
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    return ended.value.code


SCRIPTS = {
    "generate": ("generate.py", ["--prompt", "1 2"]),
    "chat": ("generate.py", ["--chat", "true", "--prompt", "1 2"]),
    "native": ("export.py", ["--to", "native"]),
    "onnx": ("export.py", ["--to", "onnx"]),
    "gguf": ("export.py", ["--to", "gguf"]),
    "hellaswag": ("eval_hellaswag.py", ["--data", "items.jsonl"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_model_that_needs_its_own_code_is_refused_in_one_line_and_nobody_is_asked(
    name, foreign, marker, monkeypatch, capfd, tmp_path
):
    if name in ("onnx", "gguf"):
        pytest.importorskip(name, reason=f"the extra {name} is not installed")
    monkeypatch.chdir(tmp_path)
    item = {"ind": 0, "ctx": "1", "endings": ["1", "2", "3", "4"], "label": 0, "activity_label": "1", "ctx_a": "1"}
    Path("items.jsonl").write_text(json.dumps(item | {"ctx_b": "1", "split": "val", "source_id": "activitynet~1"}))
    script, options = SCRIPTS[name]
    assert run(script, foreign, *options, monkeypatch=monkeypatch) == 1
    printed = capfd.readouterr()
    assert printed.out == ""
    line = printed.err.strip().split("\n")[-1]
    if name == "gguf":
        assert line.startswith("error: model_type (stranger) must be gpt2, llama or qwen3")
    else:
        assert line.startswith(f"error: {foreign} ")
        assert f"(model_type stranger) {REFUSED}" in line
    assert not marker.exists()


@pytest.mark.parametrize("lora", [None, LoraSection(rank=1)])
def test_no_run_starts_from_a_model_that_needs_its_own_code(foreign, tokenizer, marker, lora):
    data, train = DataSection(path="nowhere", sequence_length=16), TrainSection(max_steps=1)
    recipe = FinetuneRecipe(init_from=str(foreign), data=data, train=train, lora=lora)
    if lora is None:
        with pytest.raises(UserError, match=re.escape(UNKNOWN)):
            make_model(recipe, tokenizer)
        model = ModelSection(max_position_embeddings=64)
        with pytest.raises(UserError, match=re.escape(UNKNOWN)):
            make_model(Recipe(init_from=str(foreign), model=model, data=data, train=train), tokenizer)
    else:
        from gpt2x.adapters import load_base

        with pytest.raises(UserError, match=REFUSED):
            load_base(recipe, tokenizer)
    assert not marker.exists()


def test_a_tokenizer_beside_foreign_code_is_its_files_and_nothing_runs(foreign, marker):
    assert load_tokenizer(foreign).eos_token_id == 40
    assert not marker.exists()


def test_a_tokenizer_of_a_foreign_class_is_refused(tmp_path, code, marker):
    (tmp_path / "own.py").write_text(code)
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.M", "own.M"]}, "eos_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "stranger"}')
    with pytest.raises(UserError, match=REFUSED):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_corpus_and_tokenizer_of_a_preparation_run_nothing(foreign, marker, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("1 2 3\n4 5 6\n" * 9)
    arguments = ["--corpus.kind", "files", "--corpus.paths", "[texts.txt]", "--corpus.document_separator", "\n"]
    arguments += ["--corpus.validation_fraction", "0"]
    arguments += ["--output_dir", "shards", "--tokenizer.path", foreign, "--tokenizer.vocab_size", "null"]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "prepare_data.py"), run_name="__main__")
    assert Path("shards/index.json").is_file()
    assert not marker.exists()


def test_a_way_to_generate_that_a_model_brings_is_not_run(tmp_path, tokenizer, code, marker):
    save_model(GPT2XForCausalLM(GPT2XConfig(**SHAPE)), tmp_path / "model", tokenizer)
    (tmp_path / "model" / "custom_generate").mkdir()
    (tmp_path / "model" / "custom_generate" / "generate.py").write_text(code)
    with pytest.raises(UserError, match=rf"\(custom_generate\) {REFUSED}"):
        load_for_inference(str(tmp_path / "model"), dtype=torch.float32)
    assert not marker.exists()


def test_gpt2xs_own_form_is_read_by_our_own_code_whatever_lies_beside_it(tmp_path, tokenizer, code, marker):
    directory = tmp_path / "native"
    model = GPT2XForCausalLM(GPT2XConfig(**SHAPE, norm="rms_norm")).eval()
    assert save_model(model, directory, tokenizer) == "gpt2x"
    for file in directory.glob("*.py"):
        file.write_text(code)
    loaded = load_for_inference(str(directory), dtype=torch.float32)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert type(loaded) is GPT2XForCausalLM
    assert not marker.exists()
    assert TokenizerSection(path=str(directory)).vocab_size is None
    assert load_tokenizer(directory).eos_token_id == 40
