"""What the fields of a recipe take: said in words, and checked before anything is made of them."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gpt2x.config.checks import annotations_of, check_number, cut, default_of, number_in_words, shown

# --- types -----------------------------------------------------------------------------------------------------------


def hint_of(recipe_class: type, key: str) -> Any:
    """The type of the field that a dotted key names, or None where there is no such."""
    hint: Any = recipe_class
    for name in key.split("."):
        section = section_of(hint)
        hint = annotations_of(section).get(name) if section is not None else None
    return hint


def is_structured(hint: Any) -> bool:
    """Whether a field of this type is a section, a list of sections or a mapping."""
    is_mapping = any(dict in (one, get_origin(one)) for one in _alternatives(hint))
    return is_mapping or section_of(hint) is not None or item_of(hint) is not None


def is_optional(hint: Any) -> bool:
    """Whether a field of this type may be null."""
    return type(None) in _alternatives(hint)


def section_of(hint: Any) -> type | None:
    """The section's class of a field that is one, perhaps an optional one."""
    return next((one for one in _alternatives(hint) if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def item_of(hint: Any) -> Any:
    """The type of the items of a list of sections."""
    lists = [one for one in _alternatives(hint) if get_origin(one) is list]
    found = get_args(lists[0])[0] if lists else None
    return found if section_of(found) is not None else None


def is_text(hint: Any) -> bool:
    """Whether a field of this type takes a text as it stands: a name, a path, one of a few words."""
    return any(one in (str, Path) or get_origin(one) is Literal for one in _alternatives(hint))


def is_flag(hint: Any) -> bool:
    """Whether a field of this type is true or false."""
    return bool in _alternatives(hint)


def names_of(recipe_class: type, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all fields, in their order; of a list of sections those of an item too."""
    for name, hint in annotations_of(recipe_class).items():
        yield f"{prefix}{name}"
        section = section_of(hint) or section_of(item_of(hint))
        if section is not None:
            yield from names_of(section, f"{prefix}{name}.")


def _alternatives(hint: Any) -> list[Any]:
    """The types of a field, one by one and without their ranges."""
    found = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    return [get_args(one)[0] if get_origin(one) is Annotated else one for one in found]


# --- in words --------------------------------------------------------------------------------------------------------


def in_words(hint: Any) -> str:
    """What a field takes, as a user would say it."""
    words = [_one_in_words(one, hint) for one in _alternatives(hint) if one is not type(None)]
    text = " or ".join(words)
    return text if not is_optional(hint) else f"{text}, or null" if " or " in text else f"{text} or null"


def _one_in_words(kind: Any, hint: Any) -> str:
    if kind in (int, float):
        return number_in_words(hint)
    if get_origin(kind) is Literal:
        return enumerated(get_args(kind))
    if get_origin(kind) is list:
        return "a list of fields and values" if item_of(kind) is not None else "a list of texts, as [a, b]"
    if kind is dict or get_origin(kind) is dict:
        return "names and values, as {name: value}"
    return {bool: "true or false", str: "text", Path: "a path"}.get(kind, "fields and values, or the file of them")


def enumerated(names: Sequence[str]) -> str:
    """Names as a sentence lists them: a, b or c."""
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)


def nearest(name: str, names: Iterable[str], *, cutoff: float = 0.4) -> str:
    """A remedy: the name that was probably meant, or nothing."""
    matches = difflib.get_close_matches(cut(name, 60), list(names), n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]}?" if matches else ""


# --- checked ---------------------------------------------------------------------------------------------------------


def checked(value: Any, hint: Any, *, key: str = "", default: Any = None) -> Any:
    """A value of a recipe as YAML has it, where its field takes it.

    Raises:
        ValueError: where the field does not take it, in a line that names the field, the value and the rule.
    """
    if value is None and is_optional(hint):
        return None
    section, item = section_of(hint), item_of(hint)
    if section is not None and isinstance(value, Mapping | None):
        return _checked_section(value or {}, section, key=key)
    if item is not None and isinstance(value, list):
        return [checked(one, item, key=f"{key}[{number}]") for number, one in enumerate(value)]
    for kind in _alternatives(hint):
        if (found := _taken(value, kind)) is not None:
            if kind in (int, float) or isinstance(found, dict):
                check_number(found, hint, key=key, default=default)
            return found
    raise _refused(value, hint, key=key)


def _checked_section(content: Mapping[Any, Any], section: type, *, key: str) -> dict[str, Any]:
    hints, prefix = annotations_of(section), f"{key}." if key else ""
    for unknown in (str(name) for name in content if name not in hints):
        raise unknown_field(prefix + unknown, section, prefix=prefix)
    found = {
        name: checked(content[name], hint, key=prefix + name, default=default_of(section, name))
        for name, hint in hints.items()
        if name in content
    }
    if missing := list(_missing(section, content, prefix)):
        verb = "is" if len(missing) == 1 else "are"
        remedy = "add that" if "[" in prefix else "give " + " ".join(f"--{name} VALUE" for name in missing)
        raise ValueError(f"{' and '.join(missing)} {verb} needed; {remedy}, or a recipe that has it by --config.")
    absent = [name for name in hints if name not in content and _is_required(section, name)]
    return found | {name: checked({}, hints[name], key=prefix + name) for name in absent}


def _missing(section: type, content: Mapping[Any, Any], prefix: str) -> Iterator[str]:
    """The keys of what a section needs and lacks, also in the sections that it needs."""
    for name, hint in annotations_of(section).items():
        if name not in content and _is_required(section, name):
            inner = section_of(hint)
            yield from [f"{prefix}{name}"] if inner is None else _missing(inner, {}, f"{prefix}{name}.")


def made(value: Any, hint: Any) -> Any:
    """What `checked` has passed, as the section, path or number that it means.

    Raises:
        ValueError: where a section's own rule is broken.
    """
    section, item = section_of(hint), item_of(hint)
    if section is not None and isinstance(value, Mapping):
        hints = annotations_of(section)
        return section(**{name: made(one, hints[name]) for name, one in value.items()})
    if item is not None and isinstance(value, list):
        return [made(one, item) for one in value]
    kinds = _alternatives(hint)
    if Path in kinds and isinstance(value, str):
        return Path(value)
    return float(value) if float in kinds and isinstance(value, int) else value


def unknown_field(key: str, section: type, *, prefix: str = "") -> ValueError:
    """The complaint about a key that is no field of a section, with the nearest one."""
    keys = list(names_of(section, prefix))
    last = {name.rpartition(".")[2]: name for name in reversed(keys)}
    matches = difflib.get_close_matches(cut(key, 80), keys, n=1, cutoff=0.6)
    matches = matches or [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2][:80], last, n=1)]
    if matches:
        return ValueError(f"{cut(key, 80)} is no field; did you mean {matches[0]}?")
    remedy = cut(", ".join(name for name in annotations_of(section)), 110)
    return ValueError(f"{cut(key, 80)} is no field; there are {remedy}.")


def _is_required(section: type, name: str) -> bool:
    field = next(field for field in dataclasses.fields(section) if field.name == name)
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _taken(value: Any, kind: Any) -> Any:
    """The value where a field of this kind takes it, or None."""
    if get_origin(kind) is Literal:
        value = "no" if value is False and "no" in get_args(kind) else value  # which to YAML is false
        return value if value in get_args(kind) else None
    if kind in (str, Path):
        return value if isinstance(value, str) and "\0" not in value else None
    if get_origin(kind) is list:
        is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
        return value if is_list else None
    if kind is dict or get_origin(kind) is dict:
        return value if isinstance(value, dict) else None
    if isinstance(value, bool) or kind is bool:
        return value if kind is bool and isinstance(value, bool) else None
    if kind is int:
        return value if isinstance(value, int) else None
    return value if kind is float and isinstance(value, int | float) else None


def _refused(value: Any, hint: Any, *, key: str) -> ValueError:
    choices = [choice for kind in _alternatives(hint) if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        remedy = nearest(str(value), choices)
    elif is_text(hint) and isinstance(value, int | float):
        remedy = "; put it in quotes"
    elif isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]{1,18}(e[-+]?[0-9]+)?|true|false|null", value):
        remedy = "; take it out of its quotes"
    elif isinstance(value, str) and any(get_origin(kind) is list for kind in _alternatives(hint)):
        remedy = f"; write [{shown(value)}]" if item_of(hint) is None else ""
    else:
        remedy = ""
    end = "" if remedy.endswith("?") else "."
    return ValueError(f"{cut(key, 80)} ({shown(value)}) must be {in_words(hint)}{remedy}{end}")
