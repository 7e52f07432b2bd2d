"""lm-eval itself, on checkpoints of ours: its predictions are our evaluation's, and its command reads them.

Needs the extra eval. Where HellaSwag's items and GPT-2's tokenizer lie where GPT2X_TEST_DATA says, 500 of them are
compared; else items made of words.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from published_data import published
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gpt2x.evaluation.hellaswag import evaluate_hellaswag
from gpt2x.evaluation.hellaswag_items import load_hellaswag
from gpt2x.models import load_for_inference, save_model
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

pytest.importorskip("lm_eval", reason="lm-eval is in the extra eval")
pytestmark = [pytest.mark.trial, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
NUM_ITEMS = 500
QUICKSTART = yaml.safe_load((ROOT / "configuration" / "pretrain" / "quickstart.yaml").read_text())["model"]
# Larger weights than a training starts from, so that the endings' scores are far apart.
SHAPES = {
    "124m": {"initializer_range": 0.06},
    "quickstart": QUICKSTART | {"initializer_range": 0.2, "residual_init": "scaled"},
}


def items_file(directory):
    """The first lines of a file are all that lm-eval's limit takes, hence a file of the items compared."""
    source = published("hellaswag/hellaswag_val_preprocessed.jsonl")
    if source is not None:
        lines = source.read_text(encoding="utf-8").splitlines()
        lines = [lines[i * len(lines) // NUM_ITEMS] for i in range(NUM_ITEMS)]
    else:
        draw = random.Random(0)
        words = ["the", "a boat", "cuts", "[title]", "[step] ropes", "slowly", ",", "and", ".", "puts on", "in her"]

        def text(length):
            return " ".join(draw.choices(words, k=length))

        keys = ("activity_label", "ctx_a", "ctx_b")
        lines = [
            json.dumps(
                {key: text(draw.randint(1, 9)) for key in keys}
                | {"endings": [f"ends {text(draw.randint(1, 8))}" for _ in range(4)], "label": draw.randrange(4)}
            )
            for _ in range(NUM_ITEMS)
        ]
    file = directory / "items.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def make_tokenizer():
    if (tokenizer := published("gpt2-tokenizer")) is not None:
        return AutoTokenizer.from_pretrained(tokenizer)
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def write_task(directory, file):
    """lm-eval's own task, read from a file."""
    (directory / "local_utils.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    (directory / "hellaswag_local.yaml").write_text(
        f"""task: hellaswag_local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function local_utils.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
    )


def save(shape, directory):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = GPT2XConfig(**SHAPES[shape] | {"vocab_size": len(tokenizer)}, eos_token_id=tokenizer.eos_token_id)
    save_model(GPT2XForCausalLM(config), directory, tokenizer)
    return tokenizer


@pytest.mark.parametrize("shape", SHAPES)
def test_the_predictions_are_those_of_lm_eval(shape, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer, file = save(shape, tmp_path / "model"), items_file(tmp_path)
    write_task(tmp_path, file)
    model = load_for_inference(str(tmp_path / "model"), dtype=torch.float32)

    started = time.process_time()
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu"),
        tasks=["hellaswag_local"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        log_samples=True,
    )
    their_seconds = time.process_time() - started
    started = time.process_time()
    ours = evaluate_hellaswag(model, tokenizer, load_hellaswag(file))
    our_seconds = time.process_time() - started

    samples = sorted(theirs["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
    log_probs = np.array([[response[0] for response in sample["filtered_resps"]] for sample in samples])
    lengths = np.array([[len(choice) for choice in sample["doc"]["choices"]] for sample in samples])
    assert (lengths == ours.lengths).all()
    print(f"\n{shape}: largest difference {np.abs(log_probs - ours.log_probs).max():.2e} nats,", end=" ")
    print(f"spread {np.ptp(log_probs, axis=1).mean():.1f}; {their_seconds:.0f} s theirs, {our_seconds:.0f} s ours")
    for name, a, b in (
        ("acc", log_probs, ours.log_probs),
        ("acc_norm", log_probs / lengths, ours.log_probs / lengths),
    ):
        best_two = np.sort(a, axis=1)[:, -2:]
        is_close = best_two[:, 1] - best_two[:, 0] <= 1e-4
        print(
            f"{name}: {theirs['results']['hellaswag_local'][f'{name},none']} theirs, {getattr(ours, name)} ours;",
            end=" ",
        )
        print(f"closer than 1e-4: {np.flatnonzero(is_close).tolist()} of {len(samples)}")
        assert (a.argmax(1) == b.argmax(1))[~is_close].all()
        assert is_close.mean() < 0.005
        assert [sample[name] for sample in samples] == pytest.approx(
            (a.argmax(1) == [sample["doc"]["gold"] for sample in samples]).astype(float)
        )
        if not is_close.any():
            assert getattr(ours, name) == pytest.approx(theirs["results"]["hellaswag_local"][f"{name},none"])
            error = theirs["results"]["hellaswag_local"][f"{name}_stderr,none"]
            assert getattr(ours, f"{name}_stderr") == pytest.approx(error)


def run(command, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)


def test_lm_evals_own_command_reads_a_runs_final_model(tmp_path):
    save("quickstart", tmp_path / "run" / "final")
    write_task(tmp_path, items_file(tmp_path))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "hellaswag_local", "--limit", "8"]
    command += ["--model_args", f"pretrained={tmp_path}/run/final", "--include_path", str(tmp_path), "--device", "cpu"]
    finished = run([*command, "--output_path", str(tmp_path / "out")], tmp_path)
    assert finished.returncode == 0, finished.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(written.read_text())["results"]["hellaswag_local"]["acc,none"] <= 1


def test_the_script_records_lm_evals_results_with_the_run(tmp_path):
    save("quickstart", tmp_path / "run" / "final")
    (tmp_path / "run" / "stats.json").write_text('{"finished": true}')
    write_task(tmp_path, items_file(tmp_path))
    command = [sys.executable, "scripts/run_lm_eval.py", str(tmp_path / "run"), "--tasks=hellaswag_local", "--limit=8"]
    finished = run([*command, f"--include_path={tmp_path}"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    stats = json.loads((tmp_path / "run" / "stats.json").read_text())
    record = stats["evaluation"]["lm_eval/hellaswag_local"]
    assert stats["finished"]
    assert record["num_items"] == 8
    assert {"acc,none", "acc_stderr,none", "acc_norm,none", "version"} <= set(record)


def test_a_task_that_lm_eval_does_not_know_ends_in_one_line(tmp_path):
    save("quickstart", tmp_path / "run" / "final")
    finished = run([sys.executable, "scripts/run_lm_eval.py", str(tmp_path / "run"), "--tasks=no_such"], tmp_path)
    assert finished.returncode == 1
    line = "error: lm-eval knows no task no_such; `lm_eval ls tasks` lists them."
    assert finished.stderr.strip().splitlines()[-1] == line
