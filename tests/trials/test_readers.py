"""Readers in environments without gpt2x write the tokens that transformers writes here, from the files as they are."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from client_environments import (
    llama_cpp_packages,
    node_modules_with,
    packages_with,
    pinned,
    python_with,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gpt2x.config import ExportRecipe, TokenizerSection
from gpt2x.models import save_model
from gpt2x.publishing.export import Export, export_model
from gpt2x.tokenizers.bpe import train_tokenizer
from modeling_gpt2x import GPT2XForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "publishing"))
from published_models import VOCAB_SIZE, random_model

pytestmark = pytest.mark.trial

CLIENTS = Path(__file__).parent / "clients"
TEXTS = ["def main(self):\n    return 12 + 'é'", "import json\n"]
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3?"},
]
LENGTH = 48
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# A base of its own, so that a reader that overlooks it is found out.
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3_ROPE = {
    **ROPE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR_ROPE = {**ROPE, "rope_type": "linear", "factor": 2.0}
# Tied, with biases and heads wider than their share.
BIASED = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama": ("llama", {"rope_parameters": ROPE}),
    "llama-biased": ("llama", {"rope_parameters": ROPE, **BIASED}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "yarn-rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "qwen3": ("qwen3", {"rope_parameters": ROPE}),
    "nanochat": ("nanochat", {"rope_parameters": ROPE}),
    "gpt2x": ("gpt2x", {}),
}
STOCK = [name for name in MODELS if name != "gpt2x"]
TRANSFORMERS = ["transformers==4.57.*", "transformers==5.17.*", pinned("transformers"), "transformers"]
# transformers 4 has no NanoChat; mistral.rs has neither GPT-2 nor NanoChat, and refuses YaRN and Llama's head_dim.
BY_MISTRALRS = ["llama", "llama3-rope", "linear-rope", "qwen3"]
BY_LLAMA_CPP = [name for name in STOCK if name != "nanochat"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [Path(__file__).read_text()] * 2
    tokenizer = train_tokenizer(texts, TokenizerSection(path="unused", vocab_size=VOCAB_SIZE))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def published(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model by its name, written as a run writes its final/."""
    root = tmp_path_factory.mktemp("published")
    for name, (form, options) in MODELS.items():
        model = random_model(form, **options)
        with torch.no_grad():
            model.get_output_embeddings().weight[0] = 0.0  # the end of text is never the likeliest
        model.save_pretrained(root / "originals" / name)
        save_model(GPT2XForCausalLM.from_pretrained(root / "originals" / name), root / name, tokenizer)
    return root


@pytest.fixture(scope="module")
def expected(published: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[dict[str, list[int]]]]:
    """What transformers of this environment writes from the original, for the texts and the chat."""
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    prompts = [*(tokenizer(text)["input_ids"] for text in TEXTS), chat]
    answers = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(published / "originals" / name).eval()
        outputs = [
            model.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)[0].tolist()
            for ids in prompts
        ]
        answers[name] = [
            {"ids": ids, "continuation": output[len(ids) :]} for ids, output in zip(prompts, outputs, strict=True)
        ]
        assert all(len(answer["continuation"]) == LENGTH for answer in answers[name])
    return answers


def ask(command: list, request: dict[str, Any], **environment: str | Path) -> list[dict[str, Any]]:
    """A client's answers, in a process that knows neither gpt2x nor the packages of this environment."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"HF_HUB_OFFLINE": "1", **{name: str(value) for name, value in environment.items()}}
    finished = subprocess.run(
        command,
        input=json.dumps({"length": LENGTH, "texts": TEXTS, "chats": [CHAT], **request}),
        capture_output=True,
        text=True,
        cwd=CLIENTS,
        env=inherited | settings,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def export(published: Path) -> Callable[..., Export]:
    """Exports a model once for all its readers."""

    @cache
    def call(name: str, to: str, dtype: str = "float32") -> Export:
        library = {"onnx": "onnxscript", "gguf": "gguf"}[to]
        pytest.importorskip(library, reason=f"the extra {to} is not installed")
        return export_model(ExportRecipe(model=str(published / name), to=to, dtype=dtype))

    return call


@pytest.mark.parametrize("version", TRANSFORMERS)
def test_transformers_of_other_versions_writes_the_same(published: Path, expected: dict, version: str) -> None:
    names = [name for name in STOCK if name != "nanochat" or "==4." not in version]
    command = [python_with(pinned("torch"), "numpy"), CLIENTS / "transformers_client.py"]
    answers = ask(command, directories(published, names), PYTHONPATH=packages_with(version))
    assert dict(zip(names, answers, strict=True)) == {name: expected[name] for name in names}


def test_mistral_rs_writes_the_same(published: Path, expected: dict) -> None:
    command = [python_with("mistralrs"), CLIENTS / "mistralrs_client.py"]
    # Keys and values in float32, as transformers keeps them; mistral.rs' default is float16.
    answers = ask(command, directories(published, BY_MISTRALRS), MISTRALRS_CPU_KV_F32="1")
    chats = {name: expected[name][-1] for name in BY_MISTRALRS}
    assert dict(zip(BY_MISTRALRS, answers, strict=True)) == {
        name: [{"num_ids": len(chat["ids"]), "continuation": chat["continuation"]}] for name, chat in chats.items()
    }


def directories(published: Path, names: list[str]) -> dict[str, list[str]]:
    return {"directories": [str(published / name) for name in names]}


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_genai_writes_the_same(export: Callable[..., Export], expected: dict, name: str) -> None:
    directory = export(name, "onnx").path.parents[1]
    command = [python_with("onnxruntime-genai"), CLIENTS / "onnxruntime_genai_client.py"]
    assert ask(command, {"directory": str(directory)}) == expected[name]


@pytest.mark.parametrize("name", ["gpt2", "llama3-rope", "qwen3", "nanochat"])
def test_transformers_js_writes_the_same(export: Callable[..., Export], expected: dict, name: str) -> None:
    directory = export(name, "onnx").path.parents[1]
    command = transformers_js()
    assert ask(command, {"directory": str(directory), "dtype": "fp32"}) == expected[name]


def test_in_half_precision_transformers_js_and_onnxruntime_genai_write_the_same(
    export: Callable[..., Export], expected: dict
) -> None:
    directory = export("llama3-rope", "onnx", "float16").path.parents[1]
    genai = [python_with("onnxruntime-genai"), CLIENTS / "onnxruntime_genai_client.py"]
    answers = ask(genai, {"directory": str(directory)})
    assert ask(transformers_js(), {"directory": str(directory), "dtype": "fp16"}) == answers
    assert beginnings(answers) == beginnings(expected["llama3-rope"])


def beginnings(answers: list[dict[str, list[int]]]) -> list[list[int]]:
    """The first eight tokens of each: rounding turns a close choice, what is wired wrongly agrees nowhere."""
    return [answer["continuation"][:8] for answer in answers]


def transformers_js() -> list:
    library = node_modules_with("@huggingface/transformers@4.3.1") / "@huggingface" / "transformers"
    return ["node", CLIENTS / "transformers_js.mjs", library / "dist" / "transformers.node.mjs"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", BY_LLAMA_CPP)
def test_llama_cpp_writes_the_same(
    export: Callable[..., Export], expected: dict, tokenizer: PreTrainedTokenizerFast, name: str, dtype: str
) -> None:
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    file = export(name, "gguf", dtype).path
    answers = ask(llama_cpp(), {"file": str(file), "texts": [*TEXTS, chat]})
    assert [answer["ids"] for answer in answers] == [answer["ids"] for answer in expected[name]]
    assert beginnings(answers) == beginnings(expected[name])
    if dtype == "float32":
        assert answers == expected[name]


def test_llama_cpp_cuts_text_as_the_tokenizer_does(
    export: Callable[..., Export], tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [
        Path(__file__).read_text()[:3000],
        "  naïve 日本語 🙂\r\n\t x=1_000  \n\n",
        "it's we'll I'M",
        "<|endoftext|>a",
    ]
    file = export("llama", "gguf", "q8_0").path
    answers = ask(llama_cpp(), {"file": str(file), "texts": texts, "length": 0})
    assert [answer["ids"] for answer in answers] == [tokenizer(text)["input_ids"] for text in texts]


def llama_cpp() -> list:
    library = node_modules_with(*llama_cpp_packages("3.22.1")) / "node-llama-cpp"
    return ["node", CLIENTS / "llama_cpp.mjs", library / "dist" / "index.js"]
