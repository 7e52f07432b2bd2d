"""The README's way from a pretrained model to a conversation with it, as a user goes it, with a smaller model."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2x.command_line import parse_recipe
from gpt2x.config import FinetuneRecipe
from gpt2x.errors import UserError
from gpt2x.run import run as run_recipe
from gpt2x.training.signals import StopRequest

# Five processes, a minute in all; tests/training/test_finetuning.py trains in this one.
pytestmark = pytest.mark.trial

ROOT = Path(__file__).parents[2]
CHAT = ROOT / "configuration" / "finetune" / "chat.yaml"
# What a README command gets besides, so that it ends in seconds.
SHRINKING = {
    "pretrain.py": ["--train.max_steps", "3", "--train.torch_compile", "false", "--model.num_hidden_layers", "1"],
    "finetune.py": ["--train.max_steps", "4", "--train.save_steps", "2", "--train.mixed_precision", "no"],
    "eval_hellaswag.py": [],
    "generate.py": ["--max_new_tokens", "4"],
}


def readme_commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"### Fine-tuning and chat\n.*?```sh\n(.*?)```", text, flags=re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


def run(words: list[str], home: Path, *, typed: str = "") -> subprocess.CompletedProcess[str]:
    """A command of the README, without its launcher, which tests of pretrain.py try."""
    script = next(word for word in words if word.startswith("scripts/"))
    options = [*words[words.index(script) + 1 :], *SHRINKING[Path(script).name]]
    command = [sys.executable, ROOT / script, *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=home, env=environment, input=typed, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are given: a pretrained model, and a file of HellaSwag's form."""
    home = tmp_path_factory.mktemp("home")
    (home / "tokenization").symlink_to(ROOT / "tokenization")
    item = {"ind": 1, "activity_label": "Cooking", "ctx_a": "A cook stirs.", "ctx_b": "he", "ctx": "A cook stirs. he"}
    items = [
        item | {"endings": [f"{word} it." for word in ("eats", "sees", "throws", "is")], "label": n % 4}
        for n in range(6)
    ]
    (home / "hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    finished = run(["scripts/pretrain.py"], home)
    assert finished.returncode == 0, finished.stderr
    return home


@pytest.fixture(scope="module")
def outputs(home: Path) -> dict[str, str]:
    """What each command printed, in the order of the README."""
    found = {}
    for words in readme_commands():
        finished = run(words, home, typed="What does the function os.getcwd do?\n")
        assert finished.returncode == 0, finished.stderr
        found[next(word for word in words if word.startswith("scripts/"))] = finished.stdout
    return found


def test_fine_tuning_shows_what_is_learned_and_ends_in_a_stock_chat_model(home, outputs):
    printed = outputs["scripts/finetune.py"]
    assert re.search(r"<\|im_start\|>assistant\n⟦[^⟧]*<\|im_end\|>⟧", printed)
    last = printed.splitlines()[-1]
    assert last.startswith("chat with it: ")
    assert last.endswith("scripts/generate.py runs/chat/final --chat")
    final = home / "runs" / "chat" / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert type(AutoModelForCausalLM.from_pretrained(final)).__name__ == "NanoChatForCausalLM"
    assert (tokenizer.eos_token, "generation" in tokenizer.chat_template) == ("<|im_end|>", True)


def test_hellaswag_goes_into_the_runs_numbers(home, outputs):
    stats = json.loads((home / "runs" / "chat" / "stats.json").read_text())
    assert any("hellaswag" in name for name in stats["evaluation"])


def test_the_same_command_again_says_that_the_run_is_finished(home, outputs):
    again = run(["scripts/finetune.py"], home)
    assert again.stdout.startswith("runs/chat is finished; its model is in runs/chat/final.")


def finetune(words: list[str]) -> None:
    """What the script does, in this process."""
    recipe, _ = parse_recipe(FinetuneRecipe, words, script="finetune.py", default_config=CHAT)
    run_recipe(recipe, "chat", stop=StopRequest(), environment={})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init_from", "runs/nothing/there"], "does not exist; give a model's directory, a run's, or a Hub id"),
        (
            ["--data.preparation.output_dir", "data/new", "--data.preparation.chat.special_tokens", "[]"],
            "name it in chat.special_tokens",
        ),
        (
            ["--data.sequence_length", "512", "--train.tokens_per_step", "8192"],
            "must not exceed the model's max_position_embeddings",
        ),
        (["--lora.rank", "4"], "which adapters leave as they are; use chat.template tokenization/plain.jinja"),
        (["--lora.rank", "4", "--optimizer.name", "muon"], r"optimizer.name (muon) must be adamw with lora"),
    ],
    ids=["no model", "unknown token", "too long", "new tokens with lora", "muon with lora"],
)
def test_a_mistake_is_one_line(home, outputs, options, message, monkeypatch, capsys):
    monkeypatch.chdir(home)
    words = ["--run.name", "other", *SHRINKING["finetune.py"], *options]
    with pytest.raises((UserError, SystemExit)) as raised:
        finetune(words)
    told = str(raised.value) if isinstance(raised.value, UserError) else capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told


def test_the_recipe_is_the_one_the_readme_trains(home, outputs):
    recorded = yaml.safe_load((home / "runs" / "chat" / "config.yaml").read_text())
    assert (recorded["init_from"], recorded["data"]["packing"]) == ("runs/quickstart", "whole_documents")
