"""scripts/eval_hellaswag.py: the table, the record in stats.json, and what it says where something is missing."""

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gpt2x.command_line import parse_recipe
from gpt2x.config import HellaSwagRecipe, LmEvalRecipe
from gpt2x.errors import UserError
from gpt2x.evaluation.lm_eval import run_lm_eval
from gpt2x.models import save_model
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "eval_hellaswag.py"
RANKS = ROOT / "tests" / "training" / "ranks.py"


@pytest.fixture
def run_dir(tmp_path):
    """A finished run with a model of random weights."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    shape = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = GPT2XForCausalLM(GPT2XConfig(**shape, max_position_embeddings=64, initializer_range=0.3))
    save_model(model, tmp_path / "tiny" / "final", tokenizer)
    (tmp_path / "tiny" / "stats.json").write_text(json.dumps({"finished": True, "evaluation": {"other": {"acc": 1}}}))
    return tmp_path / "tiny"


@pytest.fixture
def items_file(tmp_path):
    row = {"activity_label": "Sailing", "ctx_a": "A boat.", "ctx_b": "it", "ctx": "A boat. it"}
    rows = [row | {"endings": [f"{i} sinks", "sails on", f"turns {i}", "rusts"], "label": i % 4} for i in range(8)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def evaluate(capsys, items_file, accelerator_left_as_it_was):
    """Calls the script's main with a command line, in this process, and returns what it printed."""

    def call(model, *argv):
        spec = importlib.util.spec_from_file_location("eval_hellaswag_script", SCRIPT)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        arguments = [str(model), f"--data={items_file}", *argv]
        recipe, _ = parse_recipe(HellaSwagRecipe, arguments, script="eval_hellaswag.py", positional="model")
        script.main(recipe)
        return capsys.readouterr().out

    return call


@pytest.fixture
def accelerator_left_as_it_was():
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def recorded(run_dir):
    return json.loads((run_dir / "stats.json").read_text())["evaluation"]


def test_a_runs_result_is_printed_and_recorded_beside_what_was_there(evaluate, run_dir):
    printed = evaluate(run_dir)
    result = recorded(run_dir)["hellaswag_8_items"]
    assert f"{result['acc']:.4f} ± {result['acc_stderr']:.4f}" in printed
    assert result["num_items"] == 8
    assert recorded(run_dir)["other"] == {"acc": 1}
    assert json.loads((run_dir / "stats.json").read_text())["finished"]


def test_int8_is_recorded_under_a_name_of_its_own(evaluate, run_dir):
    printed = evaluate(run_dir, "--quantize=int8", "--num_items=4")
    assert {"hellaswag_4_items", "hellaswag_4_items_int8"} <= set(recorded(run_dir))
    assert "the same ending in" in printed


def test_the_completion_style_and_bfloat16_are_named(evaluate, run_dir):
    evaluate(run_dir, "--style=hellaswag_completion", "--dtype=bfloat16")
    assert "hellaswag_completion_8_items_bfloat16" in recorded(run_dir)


@pytest.mark.trial
def test_two_processes_give_the_result_of_one(evaluate, run_dir, items_file):
    """Seven items: the second process has one fewer, and takes part in the first's last step."""
    evaluate(run_dir, "--num_items=7", "--batch_size=1")
    alone = recorded(run_dir)
    (run_dir / "stats.json").write_text("{}")
    config = ROOT / "accelerate_configs" / "cpu_2_processes.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = f"--main_process_port={probe.getsockname()[1]}"
    command = [*launcher, port, RANKS, SCRIPT, run_dir, f"--data={items_file}", "--num_items=7", "--batch_size=1"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("zero-shot") == 1
    assert finished.stdout.count(" leaves []") == 2
    assert recorded(run_dir) == {name: alone[name] for name in ("hellaswag_7_items",)}


def test_a_model_that_is_not_a_runs_final_one_records_nothing(evaluate, run_dir):
    (run_dir / "final").rename(run_dir / "model")
    evaluate(run_dir / "model")
    assert recorded(run_dir) == {"other": {"acc": 1}}


def test_a_run_that_is_not_finished_gets_no_stats(evaluate, run_dir):
    (run_dir / "stats.json").unlink()
    assert "recorded" not in evaluate(run_dir)
    assert not (run_dir / "stats.json").exists()


def test_missing_items_are_named(evaluate, run_dir):
    with pytest.raises(UserError, match=r"gone.jsonl does not exist; give HellaSwag's validation split as a .jsonl"):
        evaluate(run_dir, "--data=gone.jsonl")


@pytest.mark.parametrize(
    ("recipe_class", "arguments", "line"),
    [
        (HellaSwagRecipe, ["--num_items=0"], "num_items (0) must be a whole number from 1 to "),
        (HellaSwagRecipe, ["--batch_size=-1"], "batch_size (-1) must be a whole number from 1 to "),
        (LmEvalRecipe, ["--tasks=,"], "tasks (,) must name at least one task, as in --tasks hellaswag,piqa."),
        (LmEvalRecipe, ["--tasks=x", "--limit=0"], "limit (0) must be a whole number from 1 to "),
        (LmEvalRecipe, ["--tasks=x", "--num_fewshot=-1"], "num_fewshot (-1) must be a whole number from 0 to 10,000"),
    ],
)
def test_a_mistake_in_the_recipe_ends_in_one_line(recipe_class, arguments, line, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_recipe(recipe_class, arguments, script="eval.py", positional="model")
    assert capsys.readouterr().err.startswith(f"eval.py: error: {line}")


def test_without_lm_eval_the_script_says_how_to_install_it(run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = r"run_lm_eval.py needs lm_eval, which is not installed; run `.*python -m pip install -e '.*\[eval\]'`\."
    with pytest.raises(UserError, match=line):
        run_lm_eval(LmEvalRecipe(model=str(run_dir), tasks="hellaswag"))
