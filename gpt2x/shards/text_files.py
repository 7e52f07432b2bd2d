"""Files of text: which ones, and their rows one after the other, whatever their size."""

import glob
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow

from gpt2x.config import CorpusSection
from gpt2x.errors import UserError
from gpt2x.shards.chat_layouts import Layout
from gpt2x.shards.rows import Advance, Row
from gpt2x.shards.tables import TABLES, table_columns, table_rows

COMPRESSIONS = (".gz", ".zst")
KINDS = (".txt", ".jsonl", *TABLES)
READABLE = (*KINDS, *(kind + compression for kind in KINDS[:2] for compression in COMPRESSIONS))
# A .txt file of more bytes is one document that is read in pieces.
LONG_FILE_BYTES = 8_000_000


class LongFile(NamedTuple):
    """A .txt file that is one document and too long to be held."""

    name: str
    file: Path
    advance: Advance


def matching_files(patterns: list[str]) -> list[Path]:
    """The files of all patterns, each once: patterns in the given order, the matches of one pattern sorted.

    A folder stands for what can be read in it and in its folders.

    Raises:
        UserError: for a pattern that matches nothing, a folder without text and an unknown kind of file.
    """
    files: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"corpus.paths: {pattern!r} matches no file; correct the path, or quote the pattern.")
        for match in map(Path, matches):
            files += _files_in(match) if match.is_dir() else [_readable(match)]
    return list(dict.fromkeys(files))


def _files_in(folder: Path) -> list[Path]:
    found = sorted(Path(name) for name in glob.glob(f"{glob.escape(str(folder))}/**/*", recursive=True))
    files = [file for file in found if file.name.endswith(READABLE) and file.is_file()]
    if not files:
        raise UserError(f"corpus.paths: the folder '{folder}' holds no file of {', '.join(READABLE)}; correct it.")
    return files


def _readable(file: Path) -> Path:
    if not file.name.endswith(READABLE):
        raise UserError(
            f"corpus.paths: '{file}' is of an unknown kind; rename it to one of {', '.join(READABLE)}, or omit it."
        )
    return file


def kind_of(file: Path) -> str:
    """The suffix that says what a file holds, whether it is compressed or not."""
    return Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix


def columns_of(file: Path) -> list[str]:
    """The columns of a table, or of the first row of a .jsonl; none where it has no row.

    Raises:
        UserError: for a file that is not what its name says.
    """
    with _complaining(file):
        if file.suffix in TABLES:
            return table_columns(file)
        with closing(_json_rows(file, lambda _: None)) as rows:
            found = (row.columns(Counter()) for row in rows)
            return next((list(columns) for columns in found if columns), [])


def rows_of(
    file: Path, corpus: CorpusSection, advance: Advance, *, layout: Layout | None = None
) -> Iterator[Row | LongFile]:
    """The rows of a file.

    Args:
        file: of a kind in READABLE; any other is one document.
        corpus: names the column and the separator.
        advance: told how many bytes of the file have been read since it was told before.
        layout: of the conversations in its rows; None where they are texts.

    Raises:
        UserError: for a file that is not what its name says, and a missing column.
    """
    kind = kind_of(file)
    with _complaining(file):
        if kind in TABLES:
            found = table_columns(file)
            columns = layout.columns_in(found, str(file)) if layout else [_text_column(file, corpus, found)]
            yield from table_rows(file, columns, advance)
        elif kind == ".jsonl":
            yield from _json_rows(file, advance)
        elif corpus.document_separator is not None and kind == ".txt":
            yield from _separated_rows(file, corpus, advance)
        else:
            yield from _whole(file, corpus, advance)


@contextmanager
def _complaining(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"corpus.paths: '{file}' cannot be read ({reason}); repair it or leave it out.") from None


def _text_column(file: Path, corpus: CorpusSection, found: list[str]) -> str:
    column = corpus.text_column
    if column not in found:
        raise UserError(f"{file} has no column {column!r}, only: {', '.join(found)}; set corpus.text_column to one.")
    return column


class OpenedFile:
    """The decompressed bytes of a file, and how far in the file itself they have come from."""

    def __init__(self, file: Path) -> None:
        self.raw: Any = pyarrow.OSFile(str(file)) if file.suffix == ".zst" else file.open("rb")
        self.stream: Any = self.raw
        if file.suffix == ".zst":
            self.stream = io.BufferedReader(pyarrow.CompressedInputStream(self.raw, "zstd"), 2**16)
        elif file.suffix == ".gz":
            self.stream = io.BufferedReader(gzip.GzipFile(fileobj=self.raw), 2**16)
        self.told = 0

    def __enter__(self) -> "OpenedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.raw.close()

    def tell(self, advance: Advance) -> None:
        """Tells what has been read of the file since the last time."""
        position = self.raw.tell()
        advance(position - self.told)
        self.told = position


def decoded(content: bytes) -> str | None:
    """The text, or None where the bytes are not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _whole(file: Path, corpus: CorpusSection, advance: Advance) -> Iterator[Row | LongFile]:
    with OpenedFile(file) as opened:
        content = opened.stream.read(LONG_FILE_BYTES + 1)
    if len(content) > LONG_FILE_BYTES:
        yield LongFile(str(file), file, advance)
    else:
        yield _bytes_row(str(file), content, corpus)
        advance(file.stat().st_size)


def _bytes_row(name: str, content: bytes, corpus: CorpusSection) -> Row:
    def columns(dropped: Counter[str]) -> dict[str, Any] | None:
        found = decoded(content)
        if found is None:
            dropped["not UTF-8"] += 1
            return None
        return {corpus.text_column: found}

    return Row(name, columns)


def _separated_rows(file: Path, corpus: CorpusSection, advance: Advance) -> Iterator[Row]:
    assert corpus.document_separator is not None, "without a separator a file is one document"
    separator = corpus.document_separator.encode()
    number, buffer, searched = 0, bytearray(), 0
    with OpenedFile(file) as opened:
        while chunk := opened.stream.read(2**20):
            buffer += chunk
            start = 0
            while (end := buffer.find(separator, max(start, searched))) >= 0:
                number += 1
                yield _bytes_row(f"{file}:{number}", bytes(buffer[start:end]), corpus)
                start = end + len(separator)
            del buffer[:start]
            # A separator may lie across the chunks' border.
            searched = max(len(buffer) - len(separator) + 1, 0)
            opened.tell(advance)
    if buffer:
        yield _bytes_row(f"{file}:{number + 1}", bytes(buffer), corpus)


# Not datasets' reader: its type inference turns a text that looks like a date into one.
def _json_rows(file: Path, advance: Advance) -> Generator[Row, None, None]:
    with OpenedFile(file) as opened:
        for number, line in enumerate(opened.stream, start=1):
            if line.strip():
                yield _json_row(f"{file}:{number}", line)
            opened.tell(advance)


def _json_row(name: str, line: bytes) -> Row:
    def columns(dropped: Counter[str]) -> dict[str, Any] | None:
        found = decoded(line)
        if found is None:
            dropped["not UTF-8"] += 1
            return None
        try:
            row = json.loads(found)
        except (ValueError, RecursionError) as error:  # of numbers of thousands of digits, and of deep nesting
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{name} is not JSON ({reason}); a .jsonl file holds one object per line.") from None
        if not isinstance(row, dict):
            raise UserError(f"{name} is no JSON object but a {type(row).__name__}; a .jsonl file holds one per line.")
        return row

    return Row(name, columns)


def size_of(files: list[Path]) -> int:
    """Bytes of all files."""
    return sum(os.path.getsize(file) for file in files)
