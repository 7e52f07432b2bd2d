"""Every field of every command refuses what it cannot take, in one line and in the user's words."""

import contextlib
import copy
import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from gpt2x.command_line import parse_recipe
from gpt2x.config import (
    ExportRecipe,
    FinetuneRecipe,
    GenerationRecipe,
    HellaSwagRecipe,
    ImportRecipe,
    LmEvalRecipe,
    PreparationCommand,
    PushRecipe,
    Recipe,
    TokenizerRecipe,
)
from gpt2x.config.checks import annotations_of, check_number, shown
from gpt2x.config.fields import in_words, item_of, section_of

# What each command is told at least.
TRAINING = {"data": {"path": "shards", "sequence_length": 64}, "train": {"max_steps": 1}}
COMMANDS = {
    "pretrain": (Recipe, TRAINING),
    "finetune": (FinetuneRecipe, TRAINING | {"init_from": "x"}),
    "prepare_data": (PreparationCommand, {"output_dir": "out", "tokenizer": {"path": "tok"}}),
    "train_tokenizer": (TokenizerRecipe, {"tokenizer": {"path": "tok"}}),
    "import_tokens": (ImportRecipe, {"path": "x", "tokenizer": "tok", "output_dir": "out"}),
    "export": (ExportRecipe, {"to": "native"}),
    "push_to_hub": (PushRecipe, {"repo_id": "user/name"}),
    "generate": (GenerationRecipe, {}),
    "eval_hellaswag": (HellaSwagRecipe, {}),
    "run_lm_eval": (LmEvalRecipe, {"tasks": "piqa"}),
}
# Values that some field takes although they look wrong, and why: none so far.
ALLOWED: dict[tuple[str, float], str] = {}
# How Python and its libraries spell things, in which nobody writes a recipe.
PYTHON = re.compile(r"typing|<class|None|Union|Literal|True|False|\b(dict|str|int|float|bool)\b|Errno|Parser|Path\(|'")


def fields_of(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in annotations_of(section).items():
        yield f"{prefix}{name}", hint
        if section_of(hint) is not None:
            yield from fields_of(section_of(hint), f"{prefix}{name}.")
        if item_of(hint) is not None:
            yield from fields_of(item_of(hint), f"{prefix}{name}[0].")


def own_fields(command: str) -> list[tuple[str, Any]]:
    """Those that no command before it has under the same key; what a source of a mixture has inside, data has too."""
    before = [recipe for recipe, _ in COMMANDS.values()][: list(COMMANDS).index(command)]
    seen = {key for recipe in before for key, _ in fields_of(recipe)}
    seen |= {
        key
        for key, _ in fields_of(Recipe)
        if key.startswith(("data.sources[0].preparation.", "data.sources[0].stream."))
    }
    return [(key, hint) for key, hint in fields_of(COMMANDS[command][0]) if key not in seen]


def sections_of(section: type) -> list[type]:
    inner = [section_of(hint) or item_of(hint) for hint in annotations_of(section).values()]
    return [section, *(deeper for one in inner if one is not None for deeper in sections_of(one))]


def is_numeric(hint: Any) -> bool:
    return in_words(hint).startswith(("a number", "a whole number"))


def with_field(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The recipe with one field set."""
    changed = place = copy.deepcopy(content)
    *sections, name = key.split(".")
    for section in sections:
        empty: Any = [{}] if section.endswith("[0]") else {}
        place = place.setdefault(section.removesuffix("[0]"), empty)
        place = place[0] if isinstance(place, list) else place
    place[name] = value
    return changed


@pytest.fixture
def line_of(capsys, tmp_path, monkeypatch):
    """The complaint about a recipe or its overrides, or None where they are taken."""
    monkeypatch.chdir(tmp_path)

    def line_of(command: str, content: dict[str, Any], *overrides: str) -> str | None:
        Path("x.yaml").write_text(yaml.safe_dump(content))
        with contextlib.suppress(SystemExit):
            parse_recipe(COMMANDS[command][0], ["--config=x.yaml", *overrides], script=f"{command}.py")
            return None
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert len(error) <= 241, error
        return error.removeprefix(f"{command}.py: error: ").rstrip("\n")

    return line_of


@pytest.mark.parametrize("command", COMMANDS)
def test_the_least_recipe_of_every_command_is_taken(line_of, command):
    assert line_of(command, COMMANDS[command][1]) is None


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_out_of_range_is_refused_with_field_value_and_range(line_of, command):
    content = COMMANDS[command][1]
    for key, hint in own_fields(command):
        for value in (float("nan"), float("inf"), -float("inf"), -1, 10**30) if is_numeric(hint) else ():
            line = line_of(command, with_field(content, key, value))
            if (key, value) in ALLOWED:
                assert line is None
            else:
                assert line is not None, (key, value)
                rule = in_words(hint).removesuffix(" or null")
                assert line.startswith(f"{key} ({shown(value)}) must be {rule}"), line


SECTIONS = dict.fromkeys(one for recipe, _ in COMMANDS.values() for one in sections_of(recipe))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_out_of_range_is_refused_in_a_section_that_code_makes(section):
    for name in (name for name, hint in annotations_of(section).items() if is_numeric(hint)):
        made = object.__new__(section)
        for field in dataclasses.fields(section):
            object.__setattr__(made, field.name, float("nan") if field.name == name else None)
        with pytest.raises(ValueError, match=rf"\b{name} \(\.nan\) must be a (whole )?number "):
            made.__post_init__()


def test_a_number_in_a_mapping_is_finite():
    with pytest.raises(
        ValueError, match=r"^model.rope_parameters.rope_theta \(\.inf\) must be a number of at most 18"
    ):
        check_number({"rope_theta": float("inf")}, dict[str, Any], key="model.rope_parameters")


def test_a_text_with_a_zero_byte_is_refused(line_of):
    assert line_of("generate", {"prompt": "a\0b"}) == r'prompt ("a\u0000b") must be text or null.'


def test_a_number_of_thousands_of_digits_is_refused_in_one_line(line_of):
    digits = "9" * 5000
    Path("y.yaml").write_text(f"seed: {digits}")
    assert line_of("generate", {}, "--config=y.yaml") == "y.yaml: a number in it has thousands of digits; correct it."
    assert re.match(
        r"seed \(9+ \.\.\. 9+\) must be a whole number from 0 to ", line_of("generate", {}, f"--seed={digits}")
    )


# --- types and words -------------------------------------------------------------------------------------------------


def wrong_values(hint: Any) -> list[Any]:
    """Of another type, and a word that is none of the field's."""
    words = in_words(hint)
    if words.startswith(("text", "a path")):
        return [7, 0.5, True, [1], {"a": 1}]
    if words.startswith("a list of texts"):
        return [7, "zzz", {"a": 1}, [7], [["a"]], False]
    if words.startswith(("names and values", "a list of fields", "fields and values")):
        return [7, "zzz", True, ["zzz"]]
    return [
        "zzz",
        "1" if is_numeric(hint) else "x1",
        [1],
        {"a": 1},
        7.5 if "whole" in words or "true" in words else True,
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_value_of_another_type_is_refused_in_the_users_words(line_of, command):
    content = COMMANDS[command][1]
    for key, hint in own_fields(command):
        for value in [*wrong_values(hint), *([] if in_words(hint).endswith("null") else [None])]:
            line = line_of(command, with_field(content, key, value))
            if value is None and section_of(hint) is not None:
                continue  # a section without fields, which needs none or names the first
            assert line is not None, (key, value)
            assert re.search(rf"{re.escape(key)}(\[0\])? \(", line), line
            inner = value[0] if isinstance(value, list) and f"{key}[0]" in line else value
            assert f"({shown(inner)})" in line, line
            assert PYTHON.search(line) is None, line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_word_on_the_command_line_is_refused_in_the_users_words(line_of, command):
    content = COMMANDS[command][1]
    for key, hint in own_fields(command):
        if "[" not in key and not in_words(hint).startswith(("text", "a path")):
            line = line_of(command, content, f"--{key}=zzz")
            assert line.startswith(f"{key} (zzz) "), line
            assert PYTHON.search(line) is None, line


@pytest.mark.parametrize("command", COMMANDS)
def test_one_of_a_few_words_with_a_typing_mistake_is_refused_with_the_right_one(line_of, command):
    content = COMMANDS[command][1]
    for key, hint in own_fields(command):
        kinds = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
        for word in itertools.chain.from_iterable(map(get_args, kinds)):
            if len(word) > 3:
                line = line_of(command, with_field(content, key, word[:-1]))
                assert line.endswith(f"; did you mean {word}?"), line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_key_with_a_typing_mistake_is_refused_with_the_right_one(line_of, command):
    content = COMMANDS[command][1]
    for key, _ in own_fields(command):
        if len(key.rpartition(".")[2]) > 4:
            line = line_of(command, with_field(content, f"{key[:-2]}{key[-1]}{key[-2]}", 1))
            assert re.fullmatch(r"\S+ is no field; did you mean \S+\?", line), line


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "model", "chat"),
    [
        (["runs/x", "--chat"], "runs/x", True),
        (["--chat", "runs/x"], "runs/x", True),
        (["--chat", "--model", "runs/x"], "runs/x", True),
        (["--chat", "true", "runs/x"], "runs/x", True),
        (["runs/x", "--chat", "false"], "runs/x", False),
        (["--chat=false", "runs/x"], "runs/x", False),
        (["--seed", "7", "runs/x"], "runs/x", False),
    ],
)
def test_a_flag_needs_no_value_and_takes_no_other_word(words, model, chat):
    recipe, _ = parse_recipe(GenerationRecipe, words, script="generate.py", positional="model")
    assert (recipe.model, recipe.chat) == (model, chat)


@pytest.mark.parametrize("words", [["-m", "runs/x"], ["runs/x", "runs/y"], ["runs/x", "--chat", "perhaps"]])
def test_a_word_that_belongs_to_nothing_is_refused(capsys, words):
    with pytest.raises(SystemExit, match="2"):
        parse_recipe(GenerationRecipe, words, script="generate.py", positional="model")
    expected = r"error: (-m is no option; |runs/y is no option; |chat \(perhaps\) must be true or false\.$)"
    assert re.search(expected, capsys.readouterr().err)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_may_stand_alone(line_of, command):
    recipe_class, content = COMMANDS[command]
    flags = [
        f"--{key}" for key, hint in fields_of(recipe_class) if in_words(hint) == "true or false" and "[" not in key
    ]
    assert line_of(command, content, *flags, "--zzz=1").startswith("zzz is no field")  # the one thing that is wrong


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_speaks_the_users_words(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        parse_recipe(COMMANDS[command][0], ["--help"], script=f"{command}.py")
    text = " ".join(capsys.readouterr().out.split())
    assert re.findall(r"type: \S+|<class\S*|typing\S*|NoneType|Union|Literal|default: (?:True|False|None)", text) == []
