"""The command line of a recipe: a YAML file, overrides, and complaints of one line.

jsonargparse says what fields there are (--help) and what they are set to (--print_config); what they take is checked
by `gpt2x.config.fields`, in the words of the user.
"""

import codecs
import re
import sys
from argparse import Action
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_origin

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from gpt2x.addresses import without_secrets
from gpt2x.config import BUDGETS
from gpt2x.config.checks import cut, shown
from gpt2x.config.fields import (
    checked,
    hint_of,
    in_words,
    is_flag,
    is_optional,
    is_structured,
    is_text,
    made,
    unknown_field,
)
from gpt2x.config.parts import TEMPLATE, at_home, compose, find_recipe, load_yaml, placed, read_recipe

set_parsing_settings(docstring_parse_attribute_docstrings=True)

RecipeType = TypeVar("RecipeType")
# With "error: " before it; the name of the script counts too.
LONGEST_LINE = 230
# Texts in which a backslash can only be meant as an escape.
_ESCAPED = ("document_separator",)
_SAID = ("true", "false", "yes", "no", "on", "off")
_A_FILE = ("Path to a configuration file.", "All of the section: fields and values, or the file of them.")
_PATHS = (
    "Paths: parts of a recipe (sections, chat templates, tokenizer recipes) lie beside the file that names them, or "
    "else among those that come with gpt2x; data, models, runs and outputs lie in the working directory; ~ is your "
    "home."
)


class _Help(DefaultHelpFormatter):
    """Help that says in words what a field takes."""

    def _get_type_str(self, action: Action) -> str | None:
        hint = getattr(action, "_typehint", None)
        if hint is None or hint is bool or get_origin(hint) is Literal or action.option_strings[0].endswith(".help"):
            return None  # or what it takes stands before it
        return in_words(hint)

    def _get_help_string(self, action: Action) -> str:
        return super()._get_help_string(action).replace("type: %(type)s", "%(type)s").replace(*_A_FILE)

    def _expand_help(self, action: Action) -> str:
        return re.sub(r"default: (True|False)", lambda found: found[0].lower(), super()._expand_help(action))


class RecipeParser(ArgumentParser):
    """An argument parser that complains in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one line with the complaint and the remedy and exits with 2."""
        line = without_secrets(" ".join(str(message).split()))
        print(f"{self.prog}: error: {cut(line, LONGEST_LINE - len(self.prog))}", file=sys.stderr)
        sys.exit(2)


def parse_recipe(
    recipe_class: type[RecipeType],
    argv: Sequence[str],
    *,
    script: str,
    default_config: Path | None = None,
    positional: str | None = None,
) -> tuple[RecipeType, Path | None]:
    """Reads a recipe and its overrides from a command line.

    Overrides win over the recipe wherever they stand. A mistake ends the process with exit code 2 and one line.

    Args:
        recipe_class: the dataclass to fill.
        argv: the arguments without the program's name.
        script: the script's file name, for messages.
        default_config: the recipe used where argv names none.
        positional: a field that may also stand without its flag, wherever it stands.

    Returns:
        The recipe, and the path of the file it came from (None where everything came from flags).
    """
    parser = RecipeParser(
        prog=script,
        description=recipe_class.__doc__,
        usage=f"{script} [--config RECIPE.yaml] [--FIELD VALUE ...]",
        epilog=_PATHS,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    try:
        config_file, overrides = _config_and_overrides(argv, default_config)
        options = list(_options([*_replaced_budgets(overrides), *overrides], recipe_class, positional))
        asked = [word for key, word in options if _is_question(key)]
        if asked and not asked[0].startswith("--print"):
            _answer(parser, recipe_class, asked)
        fields = {} if config_file is None else read_recipe(config_file, recipe_class)
        for key, value in options:
            if not _is_question(key):
                _put(fields, key, _read(key, value, recipe_class))
        fields = checked(fields, recipe_class)
        recipe = at_home(made(fields, recipe_class))
        if asked:
            _answer(parser, recipe_class, ["--config", yaml.safe_dump(fields), *asked])
        return recipe, config_file
    except ValueError as error:
        parser.error(str(error))


def _answer(parser: ArgumentParser, recipe_class: type, words: Sequence[str]) -> None:
    """Prints the help or the resolved recipe, and exits."""
    parser.add_argument("--config", action="config", help="The recipe, a YAML file.")
    parser.add_class_arguments(recipe_class, sub_configs=True)
    parser.parse_args(list(words))


def _is_question(key: str) -> bool:
    """Whether an option asks for something to be printed."""
    return key == "-h" or key.rpartition(".")[2] == "help" or key.startswith("print_")


def _config_and_overrides(argv: Sequence[str], default_config: Path | None) -> tuple[Path | None, list[str]]:
    """The recipe's file, and the other arguments."""
    config, overrides, arguments = default_config, [], iter(argv)
    for argument in arguments:
        if argument == "--config" or argument.startswith("--config="):
            name = argument.removeprefix("--config=") if "=" in argument else next(arguments, "")
            if not name or name.startswith("--"):
                raise ValueError("--config needs the path of a recipe, a YAML file as those in configuration/.")
            config = find_recipe(name)
        else:
            overrides.append(argument)
    return config, overrides


def _options(arguments: Sequence[str], recipe_class: type, positional: str | None) -> Iterator[tuple[str, str]]:
    """Options one by one: a field's key and the text of its value; of what is no field the words themselves.

    A flag takes the next word only where that says true or false, so that `--chat runs/x` names a model too.
    """
    words = list(arguments)
    while words:
        word = words.pop(0)
        key, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            if word == "-h":
                yield word, word
            elif positional is None or word.startswith("-"):
                raise ValueError(f"{shown(word)} is no option; give it as --FIELD {shown(word)}, or leave it out.")
            else:
                yield positional, word
                positional = None
        elif _is_question(key):
            yield key, word
        elif has_value:
            yield key, value
        elif is_flag(hint_of(recipe_class, key)):
            follows = words[0] if words else "-"
            is_said = follows.lower() in _SAID or (positional is None and not follows.startswith("-"))
            yield key, words.pop(0) if is_said else "true"
        else:
            if hint_of(recipe_class, key) is None and not (key.endswith("+") and hint_of(recipe_class, key[:-1])):
                raise unknown_field(key, recipe_class)
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{key} needs a value: {in_words(hint_of(recipe_class, key.rstrip('+')))}.")
            yield key, words.pop(0)


def _read(key: str, text: str, recipe_class: type) -> Any:
    """The value that a word on the command line means, by the type of its field."""
    hint, name = hint_of(recipe_class, key), key.rpartition(".")[2]
    if text == "null" and is_optional(hint):
        return None
    if is_structured(hint) and text:
        return compose(_with_escapes(load_yaml(text)), hint, directory=Path(), where="", key=key)
    if not is_text(hint):
        return _value(text)
    if name in _ESCAPED:
        return _unescaped(text)
    return placed(text, Path()) if name == TEMPLATE and text else text


def _value(text: str) -> Any:
    """A number, a truth or a list as YAML has it; what is nothing to YAML is text."""
    try:
        value = load_yaml(text)
    except ValueError:
        return text
    return text if value is None and text != "null" else value


def _put(fields: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(fields.get(section), dict):
            fields[section] = {}
        fields = fields[section]
    if name.endswith("+"):
        name, before = name[:-1], fields.get(name[:-1])
        value = [*(before if isinstance(before, list) else []), *(value if isinstance(value, list) else [value])]
    fields[name] = value


def _with_escapes(value: Any) -> Any:
    """A section that stands on the command line, with its escapes read as those of a field there."""
    if isinstance(value, list):
        return [_with_escapes(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _unescaped(one) if name in _ESCAPED and isinstance(one, str) else _with_escapes(one)
        for name, one in value.items()
    }


def _unescaped(value: str) -> str:
    r"""A separator from a shell, where \n can only be meant as a line end."""
    escape = re.compile(r"\\(?:[nrtfv0\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")
    return escape.sub(lambda found: codecs.decode(found[0], "unicode_escape"), value)


def _replaced_budgets(overrides: Sequence[str]) -> list[str]:
    """A budget on the command line replaces the recipe's, of whichever kind that is."""
    budgets = {f"--train.{name}" for name in BUDGETS}
    given = {argument.split("=")[0] for argument in overrides} & budgets
    return [f"{name}=null" for name in sorted(budgets - given)] if given else []
