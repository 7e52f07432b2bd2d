"""Files as rows, one after the other, whatever their size; and the documents of .txt files, which may have any."""

import sysconfig
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from gpt2x.config import CorpusSection
from gpt2x.corpus.docstrings import conversations
from gpt2x.corpus.json_files import json_lines, json_objects
from gpt2x.corpus.layouts import Layout, TextColumn
from gpt2x.corpus.opened_files import OpenedFile, Spooled, complaining
from gpt2x.corpus.rows import Advance, Row
from gpt2x.corpus.source_files import TABLES, kind_of
from gpt2x.corpus.tables import DELIMITERS, csv_columns, csv_rows, table_columns, table_rows

# A document of more bytes in a .txt file is read in pieces.
LONG_FILE_BYTES = 8_000_000


class LongFile(NamedTuple):
    """A document of a .txt file that is too long to be held."""

    name: str
    open: Callable[[], OpenedFile | Spooled]
    """Opens it at its beginning, as often as that is needed until the next row is asked for."""
    advance: Advance


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


def unheard(_: int) -> None:
    """Is told how much was read, and makes nothing of it."""


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
            yield from _separated(file, corpus.document_separator.encode(), corpus, advance)
        else:
            yield from _whole(file, corpus, advance)


def _docstrings(file: Path, advance: Advance) -> Iterator[Row]:
    parts = file.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
    for name, messages in conversations(file, ".".join(part for part in parts if part != "__init__")):
        yield Row.of(name, {"messages": messages})
    advance(file.stat().st_size)


def _whole(file: Path, corpus: CorpusSection, advance: Advance) -> Iterator[Row | LongFile]:
    with OpenedFile(file) as opened:
        content = opened.stream.read(LONG_FILE_BYTES + 1)
    if len(content) > LONG_FILE_BYTES:
        yield LongFile(str(file), lambda: OpenedFile(file), advance)
    else:
        yield _text_row(str(file), content, corpus)
        advance(file.stat().st_size)


def _text_row(name: str, content: bytes, corpus: CorpusSection) -> Row:
    return Row(name, lambda: {corpus.text_column: content.decode()})


def _separated(file: Path, separator: bytes, corpus: CorpusSection, advance: Advance) -> Iterator[Row | LongFile]:
    document = _Document(corpus)
    number, buffer = 0, bytearray()
    with OpenedFile(file) as opened:
        while chunk := opened.stream.read(2**20):
            buffer += chunk
            start = 0
            while (end := buffer.find(separator, start)) >= 0:
                number += 1
                document.add(bytes(buffer[start:end]))
                yield from document.ended(f"{file}:{number}")
                start = end + len(separator)
            # A separator may lie across the chunks' border.
            kept = max(len(buffer) - len(separator) + 1, start)
            document.add(bytes(buffer[start:kept]))
            del buffer[:kept]
            opened.tell(advance)
    document.add(bytes(buffer))
    if document.size:
        yield from document.ended(f"{file}:{number + 1}")


class _Document:
    """A document that is being read; on the disk where it gets too long."""

    def __init__(self, corpus: CorpusSection) -> None:
        self.corpus, self.size = corpus, 0
        self._parts: list[bytes] = []
        self._spooled: Spooled | None = None

    def add(self, part: bytes) -> None:
        """Goes on with the document."""
        self._parts.append(part)
        self.size += len(part)
        if self.size > LONG_FILE_BYTES:
            self._spooled = self._spooled or Spooled()
            self._spooled.stream.writelines(self._parts)
            self._parts.clear()

    def ended(self, name: str) -> Iterator[Row | LongFile]:
        """What was read, as one row; begins the next document."""
        parts, spooled = self._parts, self._spooled
        self._parts, self._spooled, self.size = [], None, 0
        if spooled is None:
            yield _text_row(name, b"".join(parts), self.corpus)
        else:
            with closing(spooled.stream):
                yield LongFile(name, lambda: spooled, unheard)
