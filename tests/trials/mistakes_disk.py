"""What lies on the disk of somebody who makes mistakes: texts, tokenizers, shards, models, a finished run."""

import csv
import gzip
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import zeros
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parents[2]
ITEM = {
    "activity_label": "Cooking",
    "ctx_a": "A pan is hot.",
    "ctx_b": "the cook",
    "endings": list("abcd"),
    "label": 1,
}
RECIPE = {
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "data": {"path": "data/texts", "sequence_length": 32},
    "train": {"max_steps": 2, "tokens_per_step": 128, "micro_batch_size": 2, "mixed_precision": "no"},
    "evaluation": {"eval_steps": None, "num_validation_prompts": 0},
}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8


def lay_out(home: Path, environment: dict[str, str]) -> None:
    """Makes everything below `home`; half a minute."""
    _texts(home)
    _recipes(home)
    _models(home)
    for script, *arguments in (
        ("prepare_data.py", "--config", "recipes/texts.yaml"),
        ("pretrain.py", "--config", "recipes/tiny.yaml"),
    ):
        command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
        subprocess.run(command, cwd=home, env=environment, check=True, capture_output=True)
    (home / "runs" / "begun").mkdir()
    shutil.copy(home / "runs" / "tiny" / "config.yaml", home / "runs" / "begun")
    (home / "pictures" / "mine").mkdir(parents=True)
    (home / "pictures" / "mine" / "cat.png").write_bytes(PNG)
    (home / "nothing").mkdir()


def _texts(home: Path) -> None:
    (home / "texts").mkdir(parents=True)
    generator = random.Random(0)
    for number in range(40):
        text = " ".join("".join(generator.choices("etaoin", k=4)) for _ in range(generator.randint(40, 200)))
        (home / "texts" / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    (home / "notes.docx").write_bytes(b"PK")
    (home / "picture.txt").write_bytes(PNG)
    with (home / "table.parquet").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["one"], ["two"]])
    lines = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(2000)).encode()
    (home / "cut.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0)[:-4000])
    (home / "broken.jsonl").write_text('{"text": "one"}\n{"text": "two"\n')
    (home / "bodies.jsonl").write_text('{"body": "one", "id": 1}\n')
    (home / "polls.jsonl").write_text('{"question": "Which?", "votes": 3}\n')
    (home / "silent.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello?"}]}\n')
    (home / "items.jsonl").write_text((json.dumps(ITEM) + "\n") * 3)
    (home / "others.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    np.arange(100, dtype=np.uint16).tofile(home / "ids.bin")
    (home / "odd.bin").write_bytes(bytes(63))
    (home / "high.bin").write_bytes(np.full(100, 60_000, np.uint16).tobytes())


def _recipes(home: Path) -> None:
    texts = {
        "output_dir": "data/texts",
        "corpus": {"kind": "files", "paths": ["texts"], "validation_fraction": 0.2},
        "tokenizer": {"path": "data/tokenizer", "vocab_size": 300},
    }
    written = {"tiny": RECIPE, "texts": texts, "list": ["run", "data"]}
    (home / "recipes").mkdir()
    for name, content in written.items():
        (home / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (home / "recipes" / "open.yaml").write_text("train: {max_steps: 2\ndata: {path: data/texts}\n")
    (home / "recipes" / "twice.yaml").write_text("train:\n  max_steps: 2\n  max_steps: 3\n")


def _models(home: Path) -> None:
    size = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **size))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    nanochat = NanoChatForCausalLM(NanoChatConfig(**shape, num_key_value_heads=2, pad_token_id=256, **size))
    _save(gpt2, home / "models" / "gpt2")
    _save(nanochat, home / "models" / "nanochat")
    for name in ("cut", "bare", "untold", "stranger"):
        shutil.copytree(home / "models" / "gpt2", home / "models" / name)
    weights = home / "models" / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    (home / "models" / "bare" / "model.safetensors").unlink()
    (home / "models" / "untold" / "tokenizer.json").unlink()
    (home / "models" / "untold" / "tokenizer_config.json").unlink()
    config = home / "models" / "stranger" / "config.json"
    content = json.loads(config.read_text()) | {
        "model_type": "stranger",
        "auto_map": {"AutoModelForCausalLM": "own.M"},
    }
    config.write_text(json.dumps(content))
    for name, base in {"lost": "runs/gone/final", "lora": "models/gpt2"}.items():
        (home / "adapters" / name).mkdir(parents=True)
        settings = {"base_model_name_or_path": base, "peft_type": "LORA", "r": 4}
        (home / "adapters" / name / "adapter_config.json").write_text(json.dumps(settings))
        save_file({"base_model.x.lora_A.weight": zeros(4, 4)}, home / "adapters" / name / "adapter_model.safetensors")
        shutil.copy(home / "models" / "gpt2" / "tokenizer.json", home / "adapters" / name)
        shutil.copy(home / "models" / "gpt2" / "tokenizer_config.json", home / "adapters" / name)


def _save(model: PreTrainedModel, directory: Path) -> None:
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(directory)
