"""Files as rows, one after the other, whatever their size. Those of JSON are read here: one object per line (.jsonl);
objects in an array or one after the other (.json)."""

import io
import itertools
import json
import re
import sysconfig
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import IO, Any

from gpt2x.config import CorpusSection
from gpt2x.corpus.docstrings import conversations
from gpt2x.corpus.layouts import Layout, TextColumn
from gpt2x.corpus.rows import Advance, Row
from gpt2x.corpus.source_files import TABLES, kind_of
from gpt2x.corpus.tables import DELIMITERS, csv_columns, csv_rows, table_columns, table_rows
from gpt2x.corpus.text_files import (
    MAX_ROW_BYTES,
    LongFile,
    OpenedFile,
    complaining,
    separated_documents,
    too_long,
    unheard,
    whole_file,
)
from gpt2x.errors import UserError

CHARACTERS_PER_READ = 2**18
DECODER = json.JSONDecoder()
BLANK, BLANK_OR_COMMA = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")


def columns_of(file: Path) -> list[str]:
    """The columns of a table, or of the first row of a .jsonl or .json; none where it has no row.

    Raises:
        UserError: for a file that is not what its name says.
    """
    kind = kind_of(file)
    with complaining(file):
        if kind in TABLES:
            return table_columns(file)
        if kind in DELIMITERS:
            return csv_columns(file, DELIMITERS[kind])
        with closing(json_lines(file, unheard) if kind == ".jsonl" else json_objects(file, unheard)) as rows:
            return next((list(columns) for row in rows if (columns := _columns(row))), [])


def _columns(row: Row) -> dict[str, Any]:
    try:
        return row.columns()
    except UnicodeDecodeError:
        return {}


def rows_of(
    file: Path, corpus: CorpusSection, advance: Advance, layout: Layout | TextColumn
) -> Iterator[Row | LongFile]:
    """The rows of a file.

    Args:
        file: of a kind that can be read; any other is one document.
        corpus: names the column and the separator.
        advance: told how many bytes of the file have been read since it was told before.
        layout: of its rows.

    Raises:
        UserError: for a file that is not what its name says, and a missing column.
    """
    kind = kind_of(file)
    with complaining(file):
        if corpus.kind == "python_docstrings":
            yield from _docstrings(file, advance)
        elif kind in TABLES:
            yield from table_rows(file, layout.columns_in(table_columns(file), str(file)), advance)
        elif kind == ".jsonl":
            yield from json_lines(file, advance)
        elif kind == ".json":
            yield from json_objects(file, advance)
        elif kind in DELIMITERS:
            yield from csv_rows(file, DELIMITERS[kind], advance)
        elif corpus.document_separator is not None and kind == ".txt":
            yield from separated_documents(file, corpus.document_separator.encode(), corpus, advance)
        else:
            yield from whole_file(file, corpus, advance)


def _docstrings(file: Path, advance: Advance) -> Iterator[Row]:
    parts = file.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
    for name, messages in conversations(file, ".".join(part for part in parts if part != "__init__")):
        yield Row.of(name, {"messages": messages})
    advance(file.stat().st_size)


# Not datasets' reader: its type inference turns a text that looks like a date into one, and a column that is not read
# but changes its type fails there.
def json_lines(file: Path, advance: Advance) -> Generator[Row, None, None]:
    """The rows of a .jsonl, each parsed when its columns are asked for."""
    with OpenedFile(file) as opened:
        for number in itertools.count(1):
            held = [opened.read_line(number)]
            if not held[0]:
                return
            if not held[0].isspace():
                yield Row(f"{file}:{number}", partial(_parsed, held, f"{file}:{number}"))
            opened.tell(advance)


def _parsed(held: list[bytes], name: str) -> dict[str, Any]:
    """The line is taken out of its list, so that a long one and its text are not there at a time."""
    return parsed_line(held.pop().decode(), name)


def parsed_line(line: str, name: str) -> dict[str, Any]:
    """The object on a line.

    Raises:
        UserError: names a line without one.
    """
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{name} is not JSON ({_reason(error)}); a .jsonl file holds one object per line: correct it."
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{name} is no JSON object but a {type(row).__name__}; a .jsonl file holds one per line.")
    return row


def json_objects(file: Path, advance: Advance) -> Generator[Row, None, None]:
    """The rows of a .json: objects in one array, or one after the other, as many lines as they take."""
    with OpenedFile(file) as opened:
        # What is not UTF-8 becomes half of a surrogate pair, which leaves out the row that has it in its text.
        text = io.TextIOWrapper(opened.stream, encoding="utf-8", errors="surrogateescape", newline="")
        for number, row in enumerate(_objects(text, file), start=1):
            yield Row.of(f"{file}:{number}", row)
            opened.tell(advance)


def _objects(text: IO[str], file: Path) -> Iterator[dict[str, Any]]:
    """Never holds much more than one object, however long the array."""
    buffer, position = text.read(CHARACTERS_PER_READ), 0
    while buffer and (position := _end_of(BLANK, buffer, 0)) == len(buffer):
        buffer = text.read(CHARACTERS_PER_READ)
    is_array, number = buffer[position : position + 1] == "[", 0
    position += is_array
    while True:
        position = _end_of(BLANK_OR_COMMA if is_array else BLANK, buffer, position)
        if position == len(buffer):
            buffer, position = text.read(CHARACTERS_PER_READ), 0
            if buffer:
                continue
            if is_array:
                raise UserError(f"'{file}' ends before its array does, after {number} objects; repair it.")
            return
        if is_array and buffer[position] == "]":
            if buffer[position + 1 :].strip() or text.read(CHARACTERS_PER_READ).strip():
                raise UserError(f"'{file}' goes on behind the end of its array; give one array or objects alone.")
            return
        number += 1
        found, buffer, position = _object(text, buffer, position, f"{file}:{number}")
        yield found


def _end_of(pattern: re.Pattern[str], buffer: str, position: int) -> int:
    found = pattern.match(buffer, position)
    return position if found is None else found.end()


def _object(text: IO[str], buffer: str, start: int, name: str) -> tuple[dict[str, Any], str, int]:
    """The object that starts there in the buffer, the buffer perhaps read on, and where the object ends in it."""
    if buffer[start] != "{":
        raise UserError(
            f"{name} is no JSON object but begins with {buffer[start : start + 9]!r}; a .json file holds objects, in "
            f"an array or one after the other."
        )
    while True:
        try:
            found, end = DECODER.raw_decode(buffer, start)
            # A long one is not held twice while it is made use of.
            return (found, buffer[end:], 0) if end > 4 * CHARACTERS_PER_READ else (found, buffer, end)
        except (ValueError, RecursionError) as error:
            # Perhaps it is cut by the buffer's end. Twice as much each time: a long one is read in linear time.
            buffer, start = buffer[start:], 0
            if len(buffer) > MAX_ROW_BYTES:
                raise too_long(name) from None
            more = text.read(min(max(len(buffer), CHARACTERS_PER_READ), MAX_ROW_BYTES + 1 - len(buffer)))
            if not more:
                raise UserError(f"{name} is not JSON ({_reason(error)}); repair it or leave it out.") from None
            buffer += more


def _reason(error: Exception) -> str:
    """Also of numbers of thousands of digits, and of deep nesting."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)
