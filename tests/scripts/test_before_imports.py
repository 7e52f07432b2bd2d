"""What is missing or impossible is told before torch and transformers are imported, which takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
CORPUS = ["--corpus.kind", "files", "--corpus.paths", "[texts.txt]"]
TRAINED = ["--tokenizer.path", "tok", "--tokenizer.vocab_size", "300"]
# script, arguments, a part of the line
MISTAKES = [
    ("generate", ["runs/x"], "runs/x does not exist; runs here: y."),
    ("generate", ["adapters"], "adapters holds adapters, and reading them needs peft, which is not"),
    ("generate", ["bare"], "bare holds no weights"),
    ("generate", ["model"], "model holds no tokenizer"),
    ("generate", ["nanochat", "--chat", "true"], "nanochat has no chat template"),
    ("eval_hellaswag", ["nanochat", "--data", "gone.jsonl"], "gone.jsonl does not exist"),
    ("eval_hellaswag", ["nanochat", "--data", "one.txt"], "one.txt:1 is no JSON"),
    ("run_lm_eval", ["nanochat", "--tasks", "x"], "needs lm_eval, which is not installed"),
    ("export", ["nanochat", "--to", "gguf"], "model_type (nanochat) must be gpt2, llama or qwen3"),
    ("export", ["nanochat", "--to", "native", "--dtype", "int8"], "dtype (int8) must be one of"),
    ("export", ["nanochat", "--to", "onnx"], "--to onnx needs onnx, which is not installed"),
    ("export", ["nanochat", "--to", "native", "--output", "other"], "output (other) is no export"),
    ("push_to_hub", ["nanochat", "--repo_id", "me/it"], "me/it cannot be pushed to, as there is no token"),
    ("prepare_data", [*CORPUS, *TRAINED, "--output_dir", "out"], "'texts.txt' matches no file"),
    ("prepare_data", ["--tokenizer.vocab_size", "null", "--tokenizer.path", "tok"], "tok does not exist"),
    ("prepare_data", ["--output_dir", "one.txt/out"], "one.txt is a file"),
    ("prepare_data", ["--task", "7"], "task (7) must be at least 0"),
    ("train_tokenizer", [*CORPUS, *TRAINED], "'texts.txt' matches no file"),
    ("import_tokens", ["--path", "gone.bin", "--tokenizer", "nanochat", "--output_dir", "out"], "gone.bin"),
    ("import_tokens", ["--path", "ids.bin", "--tokenizer", "tok", "--output_dir", "out"], "tok does not exist"),
    ("pretrain", ["--data.preparation", "null", "--data.path", "gone"], "gone"),
    ("pretrain", ["--data.path", "ids.bin", "--data.preparation", "null"], "name the tokenizer that made them"),
    ("pretrain", ["--init_from", "gone/x"], "gone/x"),
    ("pretrain", ["--run.report_to", "[wandb]"], "run.report_to (wandb) is not installed"),
    ("pretrain", ["--run.report_to", "[wandv]"], "run.report_to (wandv) must be one of aim, "),
    ("pretrain", ["--hub.push", "true", "--hub.repo_id", "me/it"], "there is no token"),
    ("pretrain", ["--evaluation.hellaswag", "one.txt"], "one.txt:1 is no JSON"),
    ("finetune", ["--init_from", "runs/x"], "runs/x does not exist"),
    ("finetune", ["--init_from", "adapters"], "init_from (adapters) holds adapters"),
    ("finetune", ["--init_from", "strange", "--lora.rank", "4"], "is of the type strange, and adapters are for"),
    ("finetune", ["--init_from", "nanochat", "--lora.rank", "4"], "lora needs peft, which is not installed"),
    ("benchmark", ["rase"], "'rase' is no benchmark"),
]
RUNNER = """
import contextlib, json, os, runpy, sys
sys.modules |= dict.fromkeys(("lm_eval", "onnx", "peft", "wandb"))  # as if they were not installed
scripts, mistakes = json.load(sys.stdin)
for script, arguments, _ in mistakes:
    sys.argv = [f"{script}.py", *arguments]
    with contextlib.suppress(SystemExit):
        runpy.run_path(f"{scripts}/{script}.py", run_name="__main__")
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    sys.stderr.flush()
    os.write(2, b"\\0")
    print(json.dumps(heavy), flush=True)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of the mistakes says and what was imported by then, all in one process."""
    here = tmp_path_factory.mktemp("mistakes")
    for name in ("nanochat", "strange", "model"):
        (here / name).mkdir()
        (here / name / "config.json").write_text(json.dumps({"model_type": name}))
        save_file({"weight": np.ones(64, np.float32)}, here / name / "model.safetensors")
        if name != "model":
            (here / name / "tokenizer.json").write_text("{}")
    (here / "adapters").mkdir()
    (here / "adapters" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gone"}))
    (here / "bare").mkdir()
    (here / "bare" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (here / "other").mkdir()
    (here / "other" / "notes").touch()
    (here / "runs" / "y").mkdir(parents=True)
    (here / "ids.bin").write_bytes(bytes(64))
    (here / "one.txt").write_text("A text.\n")
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "RANK")}
    finished = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([str(ROOT / "scripts"), MISTAKES]),
        capture_output=True,
        text=True,
        cwd=here,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stderr
    imported = [json.loads(line) for line in finished.stdout.splitlines()]
    return list(zip(finished.stderr.split("\0"), imported, strict=False))


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[f"{s} {' '.join(a)}" for s, a, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line_before_anything_heavy_is_imported(told, number):
    line, heavy = told[number]
    assert MISTAKES[number][2] in line
    assert line.count("\n") == 1
    assert heavy == []
