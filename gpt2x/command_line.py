"""The command line of a recipe: a YAML file, overrides, and complaints of one line."""

import codecs
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from gpt2x.addresses import without_secrets
from gpt2x.config import BUDGETS
from gpt2x.config.parts import (
    TEMPLATE,
    at_home,
    compose,
    find_part,
    hint_of,
    is_optional,
    is_structured,
    load_yaml,
    placed,
    read_recipe,
)

_load_value = get_loader("yaml")


def _load_text(text: str) -> Any:
    """A value as YAML has it, but that a text such as --- or # x, which is nothing to YAML, is no null."""
    value = _load_value(text)
    return text if value is None and text.strip() != "null" else value


set_parsing_settings(docstring_parse_attribute_docstrings=True)
set_loader("yaml", _load_text, (yaml.YAMLError,))

RecipeType = TypeVar("RecipeType")
_NOT_FIELDS = ("help", "config", "print_config", "print_shtab")
_PATHS = (
    "Paths: parts of a recipe (sections, chat templates, tokenizer recipes) lie beside the file that names them, or "
    "else among those that come with gpt2x; data, models, runs and outputs lie in the working directory; ~ is your "
    "home."
)


class RecipeParser(ArgumentParser):
    """An argument parser that complains in one line and names the nearest key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one line with the complaint and the remedy and exits with 2."""
        line = without_secrets(_plain_union_complaint(" ".join(str(message).split())))
        print(f"{self.prog}: error: {line}{self._nearest(line)}", file=sys.stderr)
        sys.exit(2)

    def _nearest(self, complaint: str) -> str:
        known = [action.dest for action in self._actions if action.dest not in _NOT_FIELDS]
        unknown = re.search(r"unrecognized arguments: --([\w.]+)", complaint)
        in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", complaint)
        top_level = re.search(r"Option '([\w.]+)' is not accepted", complaint)
        if unknown:
            key = unknown[1]
        elif in_group:
            key = f"{in_group[1]}.{in_group[2]}"
        elif top_level:
            key = top_level[1]
        else:
            return f"; `python scripts/{self.prog} --help` lists every field." if "required" in complaint else ""
        matches = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        if matches:
            return f"; did you mean '{matches[0]}'?"
        return f"; there are {', '.join(sorted({name.split('.')[0] for name in known}))}."


def _plain_union_complaint(line: str) -> str:
    """jsonargparse lists every member of an optional type with its own complaint; one clause says the same."""
    rule = re.search(
        r"Errors: - (?!Expected |Does not validate |Not of type )(.*?) - Expected a <class 'NoneType'>", line
    )
    if rule is not None:  # an optional section's own complaint, which has value and remedy
        return rule[1]
    pattern = r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors:.*Given value: (.*)"
    found = re.search(pattern, line)
    if found is None:
        return line
    types = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", found[1]).replace("NoneType", "null").replace(", ", " or ")
    return f"{line[: found.start()]}expected {types}, got {found[2]!r}"


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
        positional: a field that may also stand without its flag.

    Returns:
        The recipe, and the path of the file it came from (None where everything came from flags).
    """
    parser = RecipeParser(
        prog=script,
        description=recipe_class.__doc__,
        usage=f"{script} [--config RECIPE.yaml] [--FIELD VALUE ...]",
        epilog=_PATHS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="The recipe, a YAML file.")
    parser.add_class_arguments(recipe_class, sub_configs=True)
    if positional is not None and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]
    config_file, overrides = _config_and_overrides(argv, default_config)
    try:
        fields, arguments = _composed(config_file, [*_replaced_budgets(overrides), *overrides], recipe_class)
        # Quoted and tagged, nothing can be read as something else than it is; escaped, in any locale.
        recipe = ["--config", yaml.safe_dump(fields, default_style='"')] if fields else []
        found = vars(parser.instantiate(parser.parse_args([*recipe, *arguments])))
        found.pop("config", None)
        return at_home(recipe_class(**found)), config_file
    except ValueError as error:
        parser.error(str(error))


def _config_and_overrides(argv: Sequence[str], default_config: Path | None) -> tuple[Path | None, list[str]]:
    """The recipe's file, and the other arguments."""
    config, overrides, arguments = default_config, [], iter(argv)
    for argument in arguments:
        if argument == "--config":
            config = Path(next(arguments, ""))
        elif argument.startswith("--config="):
            config = Path(argument.removeprefix("--config="))
        else:
            overrides.append(argument)
    return config, overrides


def _composed(
    config_file: Path | None, overrides: Sequence[str], recipe_class: type
) -> tuple[dict[str, Any], list[str]]:
    """The recipe put together from its files, and the arguments that are left to be parsed.

    Sections that are files, null and escapes are put into the recipe here: to jsonargparse they are text.
    """
    here = Path()
    file = None if config_file is None else find_part(str(config_file), here) or config_file
    fields = {} if file is None else read_recipe(file, recipe_class)
    left: list[tuple[str, list[str]]] = []
    for key, value, words in _options(overrides):
        hint, name = hint_of(recipe_class, key), key.rpartition(".")[2]
        if value == "null" and is_optional(hint):
            _put(fields, key, None)
            left = [option for option in left if not option[0].startswith(f"{key}.")]  # the later one wins
        elif is_structured(hint) and value:
            given = load_yaml(value)
            _put(fields, key, compose(given, hint, directory=here, where="the command line", key=key))
        elif name == "document_separator" and value:
            _put(fields, key, _unescaped(value))
        elif name == TEMPLATE and value and hint is not None:
            _put(fields, key, placed(value, here))
        else:
            left.append((key, words))
    return fields, [word for _, words in left for word in words]


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Options one by one: key, value (empty where none stands there), and the words themselves."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        key, is_one_word, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and not is_one_word and words and not words[0].startswith("--"):
            yield key, words[0], [word, words.pop(0)]
        else:
            yield key, value, [word]


def _put(fields: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(fields.get(section), dict):
            fields[section] = {}
        fields = fields[section]
    fields[name] = value


def _unescaped(value: str) -> str:
    r"""A separator from a shell, where \n can only be meant as a line end."""
    escape = re.compile(r"\\(?:[nrtfv0\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")
    return escape.sub(lambda found: codecs.decode(found[0], "unicode_escape"), value)


def _replaced_budgets(overrides: Sequence[str]) -> list[str]:
    """A budget on the command line replaces the recipe's, of whichever kind that is."""
    budgets = {f"--train.{name}" for name in BUDGETS}
    given = {argument.split("=")[0] for argument in overrides} & budgets
    return [f"{name}=null" for name in sorted(budgets - given)] if given else []
