"""Ten small runs and their exports, and the sums of all that they leave: `python tests/trials/ten_runs.py DIRECTORY`.

What moves code but means to change nothing runs it before and after and compares the two prints. The scripts are
called as users call them, in a new directory, on texts made here; tests/same_bytes.py says what "the same" means.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from same_bytes import sums  # noqa: E402

WORDS = ["def", "return", "(", ")", ":", "\n", "    ", "self", "value", "=", "1", "for", "in", "été", "naïve", "if"]
TINY_MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
MODERN = {
    "num_key_value_heads": 1,
    "position_embedding": "rope",
    "norm": "rms_norm",
    "qk_norm": "weight",
    "hidden_act": "silu",
    "gated_mlp": True,
    "attention_bias": False,
    "mlp_bias": False,
}
TRAIN = {"max_steps": 12, "tokens_per_step": 256, "micro_batch_size": 4, "num_threads": 1, "save_steps": 4}
EVALUATION = {
    "eval_steps": 6,
    "sample_steps": 6,
    "max_new_tokens": 8,
    "hellaswag": "hellaswag.jsonl",
    "hellaswag_items": 12,
}


def main(directory: Path) -> None:
    """Makes the runs in a directory that must be new, and prints a line for every file."""
    directory.mkdir(parents=True)
    write_texts(directory)
    prepare(directory)
    pretrain(directory)
    finetune(directory)
    export(directory)
    for name, digest in sums(directory).items():
        if not depends_on_the_clock(name):
            print(f"{digest}  {name}")


def depends_on_the_clock(name: str) -> bool:
    """Whether a file says how far a stream was read ahead."""
    return name.startswith("data/stream/") or (name.startswith("runs/stream/") and name.endswith("/trainer.json"))


def write_texts(directory: Path) -> None:
    """Texts, conversations and benchmark items of random words, always the same ones."""
    generator = random.Random(0)

    def words(longest: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(10, longest)))

    (directory / "texts").mkdir()
    for number in range(60):
        (directory / "texts" / f"{number:03d}.txt").write_text(words(400), encoding="utf-8")
    _write_lines(directory / "more.jsonl", [{"text": words(300)} for _ in range(80)])
    turns = ("user", "assistant", "user", "assistant")
    chats = [{"messages": [{"role": role, "content": words(15)} for role in turns]} for _ in range(60)]
    _write_lines(directory / "chats.jsonl", chats)
    items = [
        {
            "activity_label": words(12),
            "ctx_a": words(12),
            "ctx_b": "",
            "ctx": "",
            "endings": [words(12) for _ in range(4)],
            "label": number % 4,
        }
        for number in range(12)
    ]
    _write_lines(directory / "hellaswag.jsonl", [item | {"ctx": item["ctx_a"]} for item in items])


def prepare(directory: Path) -> None:
    """Two corpora by one tokenizer."""
    for name, paths, vocab_size in (("texts", "[texts]", "280"), ("more", "[more.jsonl]", "null")):
        _run(
            directory,
            "prepare_data.py",
            *("--corpus.kind", "files", "--corpus.paths", paths, "--corpus.validation_fraction", "0.2"),
            *("--output_dir", f"data/{name}", "--tokenizer.path", "data/tokenizer"),
            *("--tokenizer.vocab_size", vocab_size, "--tokens_per_shard", "4000", "--num_tasks", "2"),
        )


def pretrain(directory: Path) -> None:
    """Seven runs of twelve steps, one of them stopped in its middle and one of two processes."""
    texts = {"path": "data/texts", "sequence_length": 32}
    mixture = [
        {"name": "texts", "weight": 0.7, "path": "data/texts"},
        {"name": "more", "weight": 0.3, "path": "data/more"},
    ]
    stream = {
        "corpus": {"kind": "dataset", "dataset": "json", "data_files": ["more.jsonl"], "validation_fraction": 0.2},
        "tokenizer": "data/tokenizer",
        "cache_dir": "data/stream",
        "tokens_per_shard": 2000,
    }
    muon = {"name": "muon", "learning_rate": 1e-3, "lr_scheduler_type": "wsd", "warmup_steps": 2}
    runs = {
        "adamw": {"data": texts},
        "muon": {"data": texts, "model": TINY_MODEL | MODERN, "optimizer": muon},
        "mixture": {"data": {"sources": mixture, "sequence_length": 32, "block_size": 10}},
        "packed": {"data": texts | {"packing": "documents"}},
        "stream": {"data": {"stream": stream, "sequence_length": 32}},
        "two": {"data": texts},
        "resumed": {"data": texts},
    }
    for name, sections in runs.items():
        recipe = {
            "run": {"name": name},
            "model": TINY_MODEL,
            "train": TRAIN | {"mixed_precision": "bf16" if name == "muon" else "no"},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
            "evaluation": EVALUATION,
        } | sections
        (directory / f"{name}.yaml").write_text(json.dumps(recipe))
        arguments = ["pretrain.py", "--config", f"{name}.yaml"]
        if name == "resumed":
            _run(directory, *arguments, "--train.max_steps", "6")
        _run(directory, *arguments, num_processes=2 if name == "two" else 1)


def finetune(directory: Path) -> None:
    """All weights, and adapters merged at the end."""
    for name in ("chat", "lora"):
        recipe = {
            "run": {"name": name},
            "init_from": "runs/muon",
            "data": {
                "preparation": {
                    "output_dir": "data/chats",
                    "corpus": {"kind": "files", "paths": ["chats.jsonl"], "validation_fraction": 0.2},
                    "tokenizer": {"path": "runs/muon/final"},
                    "chat": {"template": "tokenization/plain.jinja"},
                },
                "sequence_length": 256,
                "packing": "whole_documents",
            },
            "train": TRAIN | {"mixed_precision": "no", "tokens_per_step": 1024},
            "optimizer": {"learning_rate": 1e-3},
            "evaluation": EVALUATION,
        } | ({"lora": {"rank": 4, "alpha": 8, "merge": True}} if name == "lora" else {})
        (directory / f"{name}.yaml").write_text(json.dumps(recipe))
        _run(directory, "finetune.py", "--config", f"{name}.yaml")


def export(directory: Path) -> None:
    """Each form, and what HellaSwag makes of those that our own evaluation reads."""
    for run, form, dtype in (("muon", "onnx", "int8"), ("adamw", "gguf", "float32"), ("lora", "native", "float32")):
        _run(directory, "export.py", f"runs/{run}", "--to", form, "--dtype", dtype, "--output", f"exports/{form}")
    for model in ("runs/lora", "exports/native"):
        printed = _run(directory, "eval_hellaswag.py", model, "--data", "hellaswag.jsonl")
        scores = [line for line in printed.splitlines() if "acc" in line]
        (directory / f"scores-{model.replace('/', '-')}.txt").write_text("\n".join(scores))


def _run(directory: Path, script: str, *arguments: str, num_processes: int = 1) -> str:
    """What a script prints, started as the README says but for the launcher where one process is enough."""
    launcher: Sequence[str] = ()
    if num_processes > 1:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, *launcher, ROOT / "scripts" / script, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    if finished.returncode != 0:
        sys.exit(f"{script} {' '.join(arguments)} ended with {finished.returncode}:\n{finished.stderr[-3000:]}")
    print(f"{script} {' '.join(arguments)}", file=sys.stderr)
    return finished.stdout


def _write_lines(file: Path, rows: Sequence[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
