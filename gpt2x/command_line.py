"""The command line of a recipe: a YAML file, overrides, and complaints of one line."""

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

from gpt2x.addresses import without_secrets
from gpt2x.config import BUDGETS

set_parsing_settings(docstring_parse_attribute_docstrings=True)

RecipeType = TypeVar("RecipeType")
_NOT_FIELDS = ("help", "config", "print_config", "print_shtab")


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
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="The recipe, a YAML file.")
    parser.add_class_arguments(recipe_class, sub_configs=True)
    if positional is not None and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]
    arguments = _config_first(argv, default_config)
    parsed = parser.parse_args(arguments)
    config_file = Path(arguments[1]) if arguments[:1] == ["--config"] else None
    try:
        fields = vars(parser.instantiate(parsed))
        fields.pop("config", None)
        return recipe_class(**fields), config_file
    except ValueError as error:
        parser.error(str(error))


def _config_first(argv: Sequence[str], default_config: Path | None) -> list[str]:
    """The arguments with --config moved to the front, since jsonargparse lets the later of two values win."""
    config, overrides, arguments = default_config, [], iter(argv)
    for argument in arguments:
        if argument == "--config":
            config = Path(next(arguments, ""))
        elif argument.startswith("--config="):
            config = Path(argument.removeprefix("--config="))
        else:
            overrides.append(argument)
    return (["--config", str(config)] if config is not None else []) + _replaced_budgets(overrides) + overrides


def _replaced_budgets(overrides: Sequence[str]) -> list[str]:
    """A budget on the command line replaces the recipe's, of whichever kind that is."""
    budgets = {f"--train.{name}" for name in BUDGETS}
    given = {argument.split("=")[0] for argument in overrides} & budgets
    return [f"{name}=null" for name in sorted(budgets - given)] if given else []
