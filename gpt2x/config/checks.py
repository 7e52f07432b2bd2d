"""The ranges of numbers, written beside the fields that they bound and checked in one place.

A field says ``rate: Annotated[float, Range(above=0, most=1)] = 0.1``, and its section calls `check_numbers`.
"""

import functools
import json
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml

from gpt2x.addresses import without_secrets

_LONGEST = 60


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a field takes; no field takes nan or an infinite one.

    Attributes:
        least: the smallest.
        above: or what it must exceed.
        most: the largest; what a run could take, not what would be wise.
        below: or what it must stay under.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {_figure(self.least)} to {_figure(self.most)}"
        limits = {"of at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {_figure(limit)}" for word, limit in limits.items() if limit is not None)


Count = Annotated[int, Range(least=1, most=10**15)]
"""Steps and tokens."""
Size = Annotated[int, Range(least=1, most=10**8)]
"""What is held in memory: widths, lengths, sequences of a batch."""
Workers = Annotated[int, Range(least=1, most=1024)]
"""Threads and processes."""
Seed = Annotated[int, Range(least=0, most=2**63 - 1)]
Share = Annotated[float, Range(least=0, most=1)]
ShareBelowOne = Annotated[float, Range(least=0, below=1)]
Seconds = Annotated[float, Range(above=0, most=10**6)]
"""A wait: 11 days at most."""


def check_numbers(section: object, prefix: str) -> None:
    """Raises ValueError for the first number of a section that its field does not take.

    Args:
        section: a dataclass.
        prefix: of the fields' names in messages: ``train.`` of train.max_steps.
    """
    section_class: Any = type(section)
    for name, hint in annotations_of(section_class).items():
        value = getattr(section, name)
        if isinstance(value, int | float | dict) and not isinstance(value, bool):
            check_number(value, hint, key=f"{prefix}{name}", default=default_of(section_class, name))


def check_number(value: Any, hint: Any, *, key: str, default: Any = None) -> None:
    """Raises ValueError where a number, or one in a mapping, is not what its field takes."""
    if isinstance(value, dict):
        for name, one in value.items():
            if isinstance(one, int | float) and not abs(one) <= 10**18:
                raise ValueError(f"{key}.{name} ({shown(one)}) must be a number of at most 18 digits.")
        return
    allowed = range_of(hint)
    if value not in (allowed or Range(least=-(10**18), most=10**18)):
        raise ValueError(f"{key} ({shown(value)}) must be {number_in_words(hint)}{_usual(default)}.")


@functools.cache
def annotations_of(section: Any) -> dict[str, Any]:
    """The types of a section's fields, with their ranges."""
    return get_type_hints(section, include_extras=True)


def default_of(section: type, name: str) -> Any:
    """A field's default; None where it has none, or one that is made anew each time."""
    found = next((field.default for field in fields(section) if field.name == name), MISSING)
    return None if found is MISSING else found


def range_of(hint: Any) -> Range | None:
    """The range in the annotation of a field."""
    candidates = [hint, *get_args(hint)]
    ranges = [one for found in candidates if get_origin(found) is Annotated for one in found.__metadata__]
    return next((one for one in ranges if isinstance(one, Range)), None)


def number_in_words(hint: Any) -> str:
    """What a field of numbers takes, without null."""
    candidates = [get_args(one)[0] if get_origin(one) is Annotated else one for one in (hint, *get_args(hint))]
    kind = "a number" if float in candidates else "a whole number"
    allowed = range_of(hint)
    return kind if allowed is None else f"{kind} {allowed}"


def shown(value: Any) -> str:
    """A value as YAML spells it, in one line of at most 60 characters; a long one is cut in the middle."""
    if isinstance(value, str):
        text = without_secrets(value)
        text = text if text and text.isprintable() else json.dumps(text)
    else:
        try:
            text = yaml.safe_dump(without_secrets(value), default_flow_style=True, width=10**9, allow_unicode=True)
        except (yaml.YAMLError, ValueError):  # more digits than Python spells
            text = "a number of many digits" if isinstance(value, int) else str(value)
        text = " ".join(text.removesuffix("...\n").split())
    return cut(text, _LONGEST)


def cut(text: str, longest: int) -> str:
    """A text of at most so many characters; what is too much is taken from its middle."""
    if len(text) <= longest:
        return text
    head = (longest - 5) // 2
    return f"{text[:head]} ... {text[-(longest - 5 - head) :]}"


def _usual(default: Any) -> str:
    return f"; the default is {shown(default)}" if default is not None else ""


def _figure(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
