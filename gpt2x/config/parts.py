"""Recipes as YAML files: read, and put together from their parts.

A part is a section in a file of its own, or a chat template. It lies beside the file that names it, or else among
those that come with gpt2x. All else that a recipe names (data, models, runs, outputs) lies in the working directory.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gpt2x.addresses import without_secrets
from gpt2x.config.checks import annotations_of, cut, shown
from gpt2x.config.fields import item_of, section_of

SHIPPED = Path(__file__).resolve().parents[2]
"""Where configuration/ and tokenization/ are."""
SHIPPED_FOLDERS = ("configuration", "tokenization")
# Strings that may be a path; fields of type Path are known by their type.
PLACES = {"path", "paths", "validation_path", "dataset", "data_files", "tokenizer", "init_from", "model", "hellaswag"}
TEMPLATE = "template"
# Where the parts of a section lie among those that come with gpt2x.
_SHIPPED_PARTS = {
    "model": "configuration/model/*.yaml",
    "tokenizer": "tokenization/*.yaml",
    "preparation": "configuration/data/*.yaml",
}


class _Loader(yaml.SafeLoader):
    """Reads numbers as jsonargparse does (1e-3 is one, 2020-01-01 is text), and no key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"{key.value!r} stands twice, in lines {lines[name]} and {line}; keep one of them.")
            lines[name] = line
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$|\.[0-9_]+([eE][-+][0-9]+)?$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def load_yaml(text: str) -> Any:
    """YAML as a user writes it.

    Raises:
        ValueError: for a key that stands twice in one mapping, and for what is no YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{line}{getattr(error, 'problem', None) or error}; this is no YAML.") from None
    except ValueError as error:
        if "set_int_max_str_digits" not in str(error):
            raise
        raise ValueError("a number in it has thousands of digits; correct it.") from None
    except RecursionError:
        raise ValueError("it is nested too deep; this is no recipe.") from None


def find_recipe(name: str) -> Path:
    """The file of a recipe: as it is called, or the shipped one of this name.

    Raises:
        ValueError: where it is neither, with the nearest name.
    """
    file = find_part(name, Path())
    if file is None and not os.path.lexists(os.path.expanduser(name)):
        raise ValueError(f"{cut(without_secrets(name), 140)} does not exist{_nearest_file(name, Path())}")
    return file or Path(name)


def read_recipe(file: Path, recipe_class: type) -> dict[str, Any]:
    """The fields of a recipe, with its parts in their places.

    Raises:
        ValueError: for a file that cannot be read or is no mapping in YAML, a key that stands twice, and a part that
            is missing; it names the file.
    """
    content = _read_mapping(file)
    return compose(content, recipe_class, directory=file.parent, where=str(file))


def compose(value: Any, hint: Any, *, directory: Path, where: str, key: str = "") -> Any:
    """A value of a recipe with the files that it names in place of their names.

    Args:
        value: as YAML has it.
        hint: the type of the field.
        directory: of the file that names the parts.
        where: the file, for messages; empty for the command line.
        key: the field.
    """
    section, item = section_of(hint), item_of(hint)
    if section is not None and isinstance(value, str):
        file = find_part(value, directory)
        if file is None:
            names, place = (f"{where}: ", "beside it") if where else ("", "here")
            remedy = _nearest_file(value, directory, key)
            raise ValueError(f"{names}{key} ({shown(value)}) is no file {place}, and none that gpt2x has{remedy}")
        return compose(_read_mapping(file), hint, directory=file.parent, where=str(file), key=key)
    if section is not None and isinstance(value, dict):
        hints = annotations_of(section)
        return {
            name: compose(field, hints.get(name), directory=directory, where=where, key=f"{key}.{name}".lstrip("."))
            for name, field in value.items()
        }
    if item is not None and isinstance(value, list):
        return [
            compose(one, item, directory=directory, where=where, key=f"{key}[{number}]")
            for number, one in enumerate(value)
        ]
    if key.rpartition(".")[2] == TEMPLATE and isinstance(value, str):
        return placed(value, directory)
    return value


def find_part(name: str, directory: Path) -> Path | None:
    """A part beside the file in `directory` that names it, or else the shipped one of this name."""
    path = Path(os.path.expanduser(name))
    return next((found for found in (directory / path, SHIPPED / path) if found.is_file()), None)


def _nearest_file(name: str, directory: Path, key: str = "") -> str:
    """A remedy: the file that was probably meant, beside the one that names it or among the shipped ones."""
    patterns = _SHIPPED_PARTS.get(key.rpartition(".")[2], "configuration/*/*.yaml")
    shipped = [str(file.relative_to(SHIPPED)) for file in sorted(SHIPPED.glob(patterns))]
    place = Path(os.path.expanduser(name)).parent
    files = [*(str(place / file.name) for file in sorted((directory / place).glob("*.yaml"))), *shipped]
    stems = difflib.get_close_matches(Path(name).stem[:60], [Path(file).stem for file in files], n=1, cutoff=0.5)
    similar = [file for file in files if Path(file).stem in stems]
    if not similar:
        return "; correct the path."
    return f"; did you mean {max(similar, key=lambda file: difflib.SequenceMatcher(None, name, file).ratio())}?"


def placed(name: str, directory: Path) -> str:
    """The place of a part that is read later: a shipped one by its name there, which is the same on every machine, any
    other as an absolute path; where there is none, where it was expected."""
    found = find_part(name, directory) or directory / os.path.expanduser(name)
    absolute = Path(os.path.abspath(found))
    is_shipped = absolute.is_relative_to(SHIPPED) and absolute.relative_to(SHIPPED).parts[0] in SHIPPED_FOLDERS
    return str(absolute.relative_to(SHIPPED) if is_shipped else absolute)


def shipped_or(path: Path) -> Path:
    """Where a part is read that `placed` has placed."""
    return SHIPPED / path if (SHIPPED / path).is_file() else path


def at_home(recipe: Any) -> Any:
    """A recipe whose paths have the home directory in place of ~."""
    changes = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        changed = _at_home(value, is_place=field.name in PLACES)
        if changed != value:
            changes[field.name] = changed
    return dataclasses.replace(recipe, **changes) if changes else recipe


def _at_home(value: Any, *, is_place: bool) -> Any:
    if dataclasses.is_dataclass(value):
        return at_home(value)
    if isinstance(value, list):
        return [_at_home(one, is_place=is_place) for one in value]
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    return os.path.expanduser(value) if is_place and isinstance(value, str) else value


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        content = load_yaml(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); correct the path.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8; save it as UTF-8.") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} must hold fields and their values, as in configuration/; correct it.")
    return dict(content)


def to_yaml(recipe: Any) -> str:
    """The recipe with every field written out, as YAML that parse_recipe reads back to the same recipe.

    Only what opens an address, a password or a signature, is left out.
    """
    return yaml.safe_dump(without_secrets(_plain(dataclasses.asdict(recipe))), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
