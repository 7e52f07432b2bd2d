"""Rows: what may become a document, the text in a column of one, and how a message of one line shows a value."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpt2x.errors import UserError

Advance = Callable[[int], None]


class Row(NamedTuple):
    """What may become one document. It is not looked at before it is asked for its columns, so that a task which
    reads every n-th row parses no other."""

    name: str
    """Path of the file or name of the dataset, with the number of the line or row where it holds many."""
    columns: Callable[[], dict[str, Any]]
    """Gives the columns, once; raises UnicodeDecodeError where they are not UTF-8, and UserError where they are not
    what the row's file should hold."""

    @classmethod
    def of(cls, name: str, columns: dict[str, Any]) -> "Row":
        """A row whose columns are known."""
        return cls(name, lambda: columns)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of a corpus a task reads."""

    task: int = 0
    num_tasks: int = 1
    revision: str | None = None
    """The commit of a dataset of the Hub that all tasks read; by default the newest."""


def text_of(value: Any, *, name: str, column: str) -> tuple[str, str | None]:
    """The text of a row.

    Args:
        value: what the column holds: a text, null, or a list of chat messages with role and content, whose contents
            are joined by blank lines.
        name: of the row, for messages.
        column: its name, for messages.

    Returns:
        The text and None; nothing, and why the row is left out: empty (null too, and nothing but whitespace) or not
        UTF-8 (lone surrogates, which JSON can spell and no tokenizer can).

    Raises:
        UserError: for any other value.
    """
    text = _joined(value) if isinstance(value, list) else value
    if text is None or (isinstance(text, str) and (not text or text.isspace())):
        return "", "empty"
    if not isinstance(text, str):
        raise UserError(
            f"{name}: field {column!r} must hold text or chat messages, not {shown(value)}; set corpus.text_column "
            f"to another."
        )
    return (text, None) if text.isascii() or is_unicode(text) else ("", "not UTF-8")


def _joined(messages: list[Any]) -> str | list[Any]:
    """The contents of chat messages; what is no chat is given back as it is."""
    if not all(isinstance(message, dict) for message in messages):
        return messages
    contents = [message.get("content") for message in messages]
    if not all(isinstance(content, str | None) for content in contents):
        return messages
    return "\n\n".join(content for content in contents if content)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can spell it: not with half of a surrogate pair, which JSON can spell."""
    try:
        for start in range(0, len(text), 1_000_000):  # a long one is not held twice
            text[start : start + 1_000_000].encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value of a row for a message of one line, in at most 60 characters; not as YAML, which is slow to spell it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Iterable[str], *, most: int = 8) -> str:
    """Names for a message of one line: so many, and how many there are beside them."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most:,} more" if len(every) > most else "")
