"""The commands of README and docs: each one's script exists, and its arguments are fields of that script's recipe."""

import re
import shlex
from pathlib import Path

import pytest

from gpt2x.command_line import parse_recipe
from gpt2x.config import (
    ExportRecipe,
    FinetuneRecipe,
    GenerationRecipe,
    HellaSwagRecipe,
    ImportRecipe,
    LmEvalRecipe,
    PreparationRecipe,
    PushRecipe,
    Recipe,
    TokenizerRecipe,
)

ROOT = Path(__file__).parent.parent
RECIPES = {
    "pretrain.py": (Recipe, ROOT / "configuration/pretrain/quickstart.yaml", None),
    "finetune.py": (FinetuneRecipe, ROOT / "configuration/finetune/chat.yaml", None),
    "prepare_data.py": (PreparationRecipe, ROOT / "configuration/data/python-stdlib.yaml", None),
    "train_tokenizer.py": (TokenizerRecipe, None, None),
    "generate.py": (GenerationRecipe, None, "model"),
    "export.py": (ExportRecipe, None, "model"),
    "push_to_hub.py": (PushRecipe, None, "model"),
    "import_tokens.py": (ImportRecipe, None, None),
    "eval_hellaswag.py": (HellaSwagRecipe, None, "model"),
    "run_lm_eval.py": (LmEvalRecipe, None, "model"),
}


def readme_commands() -> list[str]:
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    blocks = [block for text in texts for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def script_commands() -> list[str]:
    return [command for command in readme_commands() if "scripts/" in command and "--help" not in command]


def test_the_readme_has_commands_of_every_script_that_makes_a_model() -> None:
    named = {Path(word).name for command in script_commands() for word in shlex.split(command) if "scripts/" in word}
    assert named >= set(RECIPES)


@pytest.mark.parametrize("command", script_commands())
def test_a_command_of_the_readme_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    position = next(number for number, word in enumerate(words) if word.startswith("scripts/"))
    script = Path(words[position]).name
    assert (ROOT / "scripts" / script).is_file()
    if script in RECIPES:
        monkeypatch.chdir(ROOT)
        recipe_class, default, positional = RECIPES[script]
        if script == "prepare_data.py" and any(word.startswith("--corpus") for word in words):
            default = None  # a corpus of one's own has no hidden base
        parse_recipe(recipe_class, words[position + 1 :], script=script, default_config=default, positional=positional)


@pytest.mark.parametrize("command", [command for command in readme_commands() if command.startswith("make ")])
def test_a_make_target_of_the_readme_exists(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
