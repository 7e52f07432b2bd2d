"""A small model that has learned some chats by heart answers them, and stops, whoever reads it."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

sys.path.append(str(Path(__file__).parents[1] / "publishing"))
from published_models import greedy_on_onnx

from gpt2x.chat import Conversation
from gpt2x.config import GenerationRecipe, ModelSection, TokenizerSection
from gpt2x.models import make_config, save_model
from gpt2x.shards.index import load_index
from gpt2x.tokenizers.bpe import train_tokenizer
from modeling_gpt2x import GPT2XForCausalLM

pytestmark = pytest.mark.trial

ROOT = Path(__file__).parents[2]
GPT2 = {}
NANOCHAT = {
    "position_embedding": "rope",
    "norm": "rms_norm_weightless",
    "qk_norm": "weightless",
    "embedding_norm": True,
}
NANOCHAT |= {"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
ANIMALS = ["owl", "fox", "hare", "wolf", "bear", "lynx", "deer", "crow", "duck", "toad", "mole", "newt", "swan"]
SOUNDS = [
    "hoots",
    "barks",
    "thumps",
    "howls",
    "growls",
    "purrs",
    "bells",
    "caws",
    "quacks",
    "croaks",
    "hums",
    "clicks",
]


def write_chats(file: Path) -> None:
    """Two questions about each animal: 26 chats, some with a second turn, all answers different."""
    draw = random.Random(0)
    with file.open("w") as stream:
        for animal in ANIMALS:
            answer = f"The {animal} {draw.choice(SOUNDS)} and {draw.choice(SOUNDS)} {draw.randint(10, 99)} times. 🦉"
            turns = [("user", f"What does the {animal} do?"), ("assistant", answer)]
            stream.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
            answer = f"It eats {draw.randint(10, 99)} berries,\nthen sleeps."
            turns = [("user", f"And what does the {animal} eat at night?"), ("assistant", answer)]
            stream.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")


@pytest.fixture(scope="module", params=[GPT2, NANOCHAT], ids=["gpt2", "nanochat"])
def run_dir(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """What scripts/finetune.py makes of a model of random weights in about half a minute."""
    home = tmp_path_factory.mktemp("chat")
    write_chats(home / "chats.jsonl")
    texts = (home / "chats.jsonl").read_text().splitlines()
    tokenizer = train_tokenizer(texts, TokenizerSection(path="unused", vocab_size=300))
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    config = make_config(ModelSection(**shape, **request.param), tokenizer)
    torch.manual_seed(0)
    save_model(GPT2XForCausalLM(config), home / "base", tokenizer)
    recipe = {
        "init_from": str(home / "base"),
        "run": {"dir": str(home / "runs")},
        "data": {
            "preparation": {
                "output_dir": str(home / "shards"),
                "corpus": {"kind": "files", "paths": [str(home / "chats.jsonl")], "validation_fraction": 0.15},
                "tokenizer": {"path": str(home / "base")},
                "chat": {
                    "template": str(ROOT / "tokenization" / "chatml.jinja"),
                    "special_tokens": ["<|im_start|>", "<|im_end|>"],
                    "end_of_turn": "<|im_end|>",
                },
            },
            "sequence_length": 128,
            "packing": "whole_documents",
        },
        "train": {
            "max_steps": 400,
            "tokens_per_step": 1024,
            "micro_batch_size": 8,
            "mixed_precision": "no",
        },
        "optimizer": {"learning_rate": 4e-3, "weight_decay": 0.0, "warmup_steps": 20},
        "evaluation": {"eval_steps": None, "num_validation_prompts": 0},
    }
    (home / "overfit.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, ROOT / "scripts" / "finetune.py", "--config", home / "overfit.yaml"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    assert "⟦" in finished.stdout  # the preview with its mask
    return home


@pytest.fixture(scope="module")
def chats(run_dir: Path) -> list[tuple[str, str]]:
    """Question and answer of twenty chats that were trained on."""
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "shards" / "tokenizer")
    rows = [json.loads(line)["messages"] for line in (run_dir / "chats.jsonl").read_text().splitlines()]
    trained = []
    for shard in load_index(run_dir / "shards").open_split("train"):
        for start, end in zip(shard.documents, shard.documents[1:]):
            trained.append(tokenizer.decode(shard.tokens[start:end]))
    found = [(question["content"], answer["content"]) for question, answer in rows]
    found = [(question, answer) for question, answer in found if any(question in text for text in trained)]
    assert len(found) >= 20
    return found[:20]


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def load(run_dir: Path) -> tuple[AutoModelForCausalLM, PreTrainedTokenizerFast]:
    final = run_dir / "runs" / "overfit" / "final"
    return AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)


def test_generate_with_the_chat_template_of_transformers(run_dir, chats):
    model, tokenizer = load(run_dir)
    for question, answer in chats:
        inputs = tokenizer.apply_chat_template(
            asked(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(ids) == answer + "<|im_end|>"


def test_the_pipeline_that_is_given_messages(run_dir, chats):
    model, tokenizer = load(run_dir)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for question, answer in chats:
        (found,) = generator(asked(question), max_new_tokens=60, do_sample=False)
        assert found["generated_text"][-1] == {"role": "assistant", "content": answer}


def test_the_exported_onnx_file(run_dir, chats):
    from gpt2x.publishing.onnx_decoder import OnnxDecoder

    exported = run_dir / "onnx"
    if not exported.exists():
        command = [sys.executable, ROOT / "scripts" / "export.py", run_dir / "runs" / "overfit", "--to", "onnx"]
        subprocess.run([*command, "--output", exported], check=True, capture_output=True, timeout=600)
    _, tokenizer = load(run_dir)
    decoder = OnnxDecoder(exported)
    prompts = [
        tokenizer.apply_chat_template(asked(question), add_generation_prompt=True, return_dict=False)
        for question, _ in chats
    ]
    found = [tokenizer.decode(ids) for ids in greedy_on_onnx(decoder, prompts, 60)]
    assert [text.split("<|im_end|>")[0] for text in found] == [answer for _, answer in chats]


def test_our_own_chat(run_dir, chats):
    model, tokenizer = load(run_dir)
    for question, answer in chats:
        assert Conversation(model, tokenizer, GenerationRecipe(chat=True, temperature=0)).answer(question) == answer


def test_the_chat_script(run_dir, chats):
    question, answer = chats[0]
    command = [sys.executable, ROOT / "scripts" / "generate.py", run_dir / "runs" / "overfit"]
    options = ["--chat", "true", "--temperature", "0", "--prompt", question]
    finished = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert finished.stdout.rstrip("\n").endswith(answer)


ALONE = """
import json, sys
sys.modules["gpt2x"] = sys.modules["modeling_gpt2x"] = None  # whoever imports them fails
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, questions = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
answers = []
for question in questions:
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    answers.append(tokenizer.decode(ids, skip_special_tokens=True))
print(json.dumps(answers))
"""


def test_a_process_without_gpt2x(run_dir, chats):
    final = run_dir / "runs" / "overfit" / "final"
    command = [sys.executable, "-c", ALONE, final, json.dumps([question for question, _ in chats])]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=run_dir, timeout=300)
    assert json.loads(finished.stdout) == [answer for _, answer in chats], finished.stderr
