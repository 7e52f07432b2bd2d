"""Values that come from outside: how a message shows one, and whether a text is one."""

from collections.abc import Iterable
from typing import Any


def shown(value: Any) -> str:
    """A value of a row for a message of one line, in at most 60 characters; not as YAML, which is slow to spell it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Iterable[str], *, most: int = 8) -> str:
    """Names for a message of one line: so many, and how many there are beside them."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most:,} more" if len(every) > most else "")


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can spell it: not with half of a surrogate pair, which JSON can spell."""
    try:
        for start in range(0, len(text), 1_000_000):  # a long one is not held twice
            text[start : start + 1_000_000].encode()
    except UnicodeEncodeError:
        return False
    return True
