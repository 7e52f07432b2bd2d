"""Recipes that need the network, run on local files of the same shape, shrunk by overrides."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2x.config import TokenizerSection
from gpt2x.tokenizers.bpe import save_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.trial
def test_the_streaming_recipe_of_the_readme_trains_on_local_rows(tmp_path):
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=5)) for _ in range(200)]
    texts = [" ".join(generator.choices(words, k=60)) for _ in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    section = TokenizerSection(path=str(tmp_path / "tokenizer"), vocab_size=300)
    save_tokenizer(train_tokenizer(texts, section), tmp_path / "tokenizer")
    overrides = {
        "run.name": "streamed",
        "data.stream.corpus.dataset": "json",
        "data.stream.corpus.dataset_config": "null",
        "data.stream.corpus.data_files": f"[{tmp_path / 'rows.jsonl'}]",
        "data.stream.corpus.validation_fraction": 0.1,
        "data.stream.tokenizer": tmp_path / "tokenizer",
        "data.stream.tokens_per_shard": 4000,
        "data.sequence_length": 32,
        "train.max_steps": 10,
        "train.tokens_per_step": 512,
        "train.micro_batch_size": 16,
        "train.torch_compile": "false",
        "model.hidden_size": 48,
        "model.num_hidden_layers": 2,
        "model.intermediate_size": 96,
        "model.num_attention_heads": 6,
        "model.num_key_value_heads": 2,
        "evaluation.max_new_tokens": 4,
    }
    flags = [f"--{name}={value}" for name, value in overrides.items()]
    recipe = ROOT / "configuration" / "pretrain" / "stream-fineweb-edu.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command = [*launcher, ROOT / "scripts" / "pretrain.py", "--config", recipe, *flags]
    finished = subprocess.run(
        [str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    stats = json.loads((tmp_path / "runs" / "streamed" / "stats.json").read_text())
    assert stats["steps"] == 10
    assert stats["model_type"] == "qwen3"
