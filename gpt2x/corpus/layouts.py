"""How rows hold documents: a text in a column, or a conversation in one of the layouts that data sets give them, which
are recognized by the names of their columns alone."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpt2x.corpus.rows import listed, shown, text_of
from gpt2x.errors import UserError

Message = dict[str, Any]
"""Who speaks (role: system, user, assistant or tool) and what is said (content), and learned: False for a turn that is
not to be learned."""

# What is said besides the content, which our templates do not write; and whether a turn is learned.
UNWRITTEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
FLAGS = ("train", "loss", "weight")
NO_TOOLS: tuple[Any, ...] = (None, "", [], {}, "[]", "{}", "null")

# What data sets call them; ShareGPT's names, and those that its followers have added.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class Document(NamedTuple):
    """What a row holds."""

    text: str
    """Of a conversation all that is said, as JSON: the same for every layout, so the same conversation falls on the
    same side of the split wherever it comes from."""
    left_out: str | None
    """Why the row is left out: empty, not UTF-8."""
    messages: list[Message] | None = None
    """None for a plain text."""


@dataclass(frozen=True, kw_only=True)
class TextColumn:
    """Rows whose text stands in one column; the others are not read."""

    column: str

    def columns_in(self, found: Sequence[str], name: str) -> list[str]:
        """The column, which must be among those that were found.

        Raises:
            UserError: where it is not.
        """
        if self.column not in found:
            raise self._missing(f"{name} has no column", found)
        return [self.column]

    def document(self, columns: Mapping[str, Any], name: str) -> Document:
        """The text of a row.

        Raises:
            UserError: names a row without the column, and one that holds something else there.
        """
        if self.column not in columns:
            raise self._missing(f"{name} has no field", columns)
        return Document(*text_of(columns[self.column], name=name, column=self.column))

    def _missing(self, what: str, found: Iterable[str]) -> UserError:
        return UserError(f"{what} {self.column!r}, only: {listed(found)}; set corpus.text_column to one of them.")


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The columns of a row, whose mistakes are told with its name."""

    name: str
    """Of the row: its file or dataset and its number."""
    row: dict[str, Any]

    def said(self, column: str, role: str) -> list[Message]:
        """A column that holds what one side says as text, or a list of messages.

        Raises:
            UserError: where it holds neither.
        """
        if isinstance(self.row[column], list):
            return self.messages(column)
        return [{"role": role, "content": self.text(column)}]

    def text(self, column: str) -> str:
        """A column that holds text.

        Raises:
            UserError: where it does not.
        """
        value = self.row[column]
        if not isinstance(value, str):
            raise UserError(
                f"{self.name}: column {column!r} must hold text, not {shown(value)}; correct the row or leave it out."
            )
        return value

    def messages(self, column: str) -> list[Message]:
        """A column that holds a list of messages: role and content, or ShareGPT's from and value.

        Raises:
            UserError: where it does not, or a message in it does not have its two texts or has an unknown role.
        """
        value = self.row[column]
        if not isinstance(value, list):
            raise UserError(
                f"{self.name}: column {column!r} must hold a list of messages, not {shown(value)}; correct the row "
                f"or leave it out."
            )
        return [_message(one, f"{self.name}: message {n} of {column!r}") for n, one in enumerate(value, start=1)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(
            f"{place} must have a role and a content, not be {shown(value)}; correct the row or leave it out."
        )
    # A table gives every message the keys of all, and null for those it lacks.
    role_key, content_key = ("role", "content") if value.get("role") is not None else ("from", "value")
    role, content = value.get(role_key), value.get(content_key)
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(
            f"{place} is said by {shown(role)}, who is none of {', '.join(ROLES)}; rename the role or leave the row "
            f"out."
        )
    for key in UNWRITTEN:
        if value.get(key):
            raise UserError(
                f"{place} has {key}, which no chat template of text writes out; put them into its {content_key} or "
                f"leave the row out."
            )
    if not isinstance(content, str):
        raise UserError(
            f"{place} must have text as its {content_key}, not {shown(content)}; correct the row or leave it out."
        )
    message = {"role": ROLES[role], "content": content}
    return message if _is_learned(value, place, message["role"]) else message | {"learned": False}


def _is_learned(value: dict[str, Any], place: str, role: str) -> bool:
    """Whether no flag says that a turn is not learned. Of what is never learned a flag may say anything."""
    flags = {flag: value[flag] for flag in FLAGS if value.get(flag) is not None}
    for flag, found in flags.items():
        if role == "assistant" and found not in (0, 1):
            raise UserError(
                f"{place} has {flag} {shown(found)}, and a turn is learned or not; give it 1 (true) or 0 (false)."
            )
    return all(found != 0 for found in flags.values())


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to write conversations, or plain texts among them, into the columns of a table."""

    required: tuple[str, ...]
    """The columns it is recognized by."""
    optional: tuple[str, ...] = ("system", "tools")
    """Columns it may have besides."""
    read: Callable[[Cells], list[Message]] | None
    """Gives the messages of a row; None where a row is plain text, which no template is put around."""

    def __str__(self) -> str:
        return " + ".join(self.required)

    def columns_in(self, found: Sequence[str], name: str) -> list[str]:
        """Which of the columns that were found are the layout's.

        Args:
            found: the columns of a file or a row.
            name: its name, for messages.

        Raises:
            UserError: for the first required one that is missing.
        """
        for column in self.required:
            if column not in found:
                raise UserError(
                    f"{name} has no column {column!r}, only: {listed(found)}; the corpus begins with the columns "
                    f"{self}: give every row those, or prepare the others by themselves."
                )
        return [column for column in (*self.required, *self.optional) if column in found]

    def document(self, columns: dict[str, Any], name: str) -> Document:
        """The conversation of a row, or its plain text.

        Raises:
            UserError: names the row and the column that does not hold what the layout says.
        """
        self.columns_in(list(columns), name)
        if self.read is not None:
            messages = _messages(Cells(name=name, row=columns), self.read)
            text = json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)
            # JSON can spell half of a surrogate pair, which no UTF-8 and no tokenizer can.
            return Document(*text_of(text, name=name, column="messages"), messages)
        if isinstance(columns["text"], list):
            raise UserError(f"{name}: column 'text' holds a list; name a column of messages messages, or give text.")
        return Document(*text_of(columns["text"], name=name, column="text"))


def _messages(cells: Cells, read: Callable[[Cells], list[Message]]) -> list[Message]:
    """A conversation, begun by its system column where no message of it is the system's."""
    if cells.row.get("tools") not in NO_TOOLS:
        raise UserError(
            f"{cells.name}: column 'tools' holds tools, which no chat template of text writes out; put them into a "
            f"system message or leave the row out."
        )
    messages = read(cells)
    said = cells.text("system") if cells.row.get("system") is not None else ""
    if not said or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": said}, *messages]


def _pair(asked: str, answered: str) -> Callable[[Cells], list[Message]]:
    return lambda cells: [*cells.said(asked, "user"), *cells.said(answered, "assistant")]


def _alpaca(cells: Cells) -> list[Message]:
    """What is asked for, and after a blank line what it is asked of, where there is such."""
    instruction, answer = cells.text("instruction"), cells.text("output")
    asked_of = cells.text("input") if cells.row.get("input") is not None else ""
    asked = f"{instruction}\n\n{asked_of}" if asked_of else instruction
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


# The first that fits counts: Alpaca's own rows also have a text, UltraChat's messages also a prompt.
LAYOUTS = (
    Layout(required=("messages",), read=lambda cells: cells.messages("messages")),
    Layout(required=("conversations",), read=lambda cells: cells.messages("conversations")),
    Layout(required=("prompt", "completion"), read=_pair("prompt", "completion")),
    Layout(required=("instruction", "output"), optional=("input", "system", "tools"), read=_alpaca),
    Layout(required=("question", "answer"), read=_pair("question", "answer")),
    Layout(required=("text",), optional=(), read=None),
)


def find_layout(found: Sequence[str], name: str) -> Layout:
    """The layout of a corpus.

    Args:
        found: the columns of its first row.
        name: of the corpus, for messages.

    Raises:
        UserError: lists the columns that were found and those of every layout.
    """
    for layout in LAYOUTS:
        if set(layout.required) <= set(found):
            return layout
    raise UserError(
        f"{name} has the columns {listed(found)}, which make no conversation; rename them to those of one layout "
        f"({'; '.join(map(str, LAYOUTS))}), or leave chat out."
    )
