"""Files of text: which ones, and their rows one after the other, whatever their size.

A row is not looked at before it is asked for its text, so that a task which reads every n-th row parses no other.
"""

import glob
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from gpt2x.config import CorpusSection
from gpt2x.errors import UserError
from gpt2x.shards.rows import text_of

COMPRESSIONS = (".gz", ".zst")
KINDS = (".txt", ".jsonl", ".parquet", ".arrow")
READABLE = (*KINDS, *(kind + compression for kind in KINDS[:2] for compression in COMPRESSIONS))
# A .txt file of more bytes is one document that is read in pieces.
LONG_FILE_BYTES = 8_000_000
ROWS_PER_BATCH = 128

Advance = Callable[[int], None]


class Row(NamedTuple):
    """What may become one document."""

    name: str
    """Path of the file, with the number of the line or row where a file holds many documents."""
    text: Callable[[Counter[str]], str | None]
    """Gives the text; or None after counting why there is none."""


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


def rows_of(file: Path, corpus: CorpusSection, advance: Advance) -> Iterator[Row | LongFile]:
    """The rows of a file.

    Args:
        file: of a kind in READABLE; any other is one document.
        corpus: names the column and the separator.
        advance: told how many bytes of the file have been read since it was told before.

    Raises:
        UserError: for a file that is not what its name says, and a missing column.
    """
    kind = Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix
    try:
        if kind in (".parquet", ".arrow"):
            yield from _column_rows(file, corpus.text_column, advance)
        elif kind == ".jsonl":
            yield from _json_rows(file, corpus.text_column, advance)
        elif corpus.document_separator is not None and kind == ".txt":
            yield from _separated_rows(file, corpus.document_separator.encode(), advance)
        else:
            yield from _whole(file, advance)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"corpus.paths: '{file}' cannot be read ({reason}); repair it or leave it out.") from None


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


def _whole(file: Path, advance: Advance) -> Iterator[Row | LongFile]:
    with OpenedFile(file) as opened:
        content = opened.stream.read(LONG_FILE_BYTES + 1)
    if len(content) > LONG_FILE_BYTES:
        yield LongFile(str(file), file, advance)
    else:
        yield _bytes_row(str(file), content)
        advance(file.stat().st_size)


def _bytes_row(name: str, content: bytes) -> Row:
    def text(dropped: Counter[str]) -> str | None:
        found = decoded(content)
        if found is None:
            dropped["not UTF-8"] += 1
            return None
        return text_of(found, name=name, column="text", dropped=dropped)

    return Row(name, text)


def _separated_rows(file: Path, separator: bytes, advance: Advance) -> Iterator[Row]:
    number, buffer, searched = 0, bytearray(), 0
    with OpenedFile(file) as opened:
        while chunk := opened.stream.read(2**20):
            buffer += chunk
            start = 0
            while (end := buffer.find(separator, max(start, searched))) >= 0:
                number += 1
                yield _bytes_row(f"{file}:{number}", bytes(buffer[start:end]))
                start = end + len(separator)
            del buffer[:start]
            # A separator may lie across the chunks' border.
            searched = max(len(buffer) - len(separator) + 1, 0)
            opened.tell(advance)
    if buffer:
        yield _bytes_row(f"{file}:{number + 1}", bytes(buffer))


# Not datasets' reader: its type inference turns a text that looks like a date into one.
def _json_rows(file: Path, column: str, advance: Advance) -> Iterator[Row]:
    with OpenedFile(file) as opened:
        for number, line in enumerate(opened.stream, start=1):
            if line.strip():
                yield _json_row(f"{file}:{number}", line, column)
            opened.tell(advance)


def _json_row(name: str, line: bytes, column: str) -> Row:
    def text(dropped: Counter[str]) -> str | None:
        found = decoded(line)
        if found is None:
            dropped["not UTF-8"] += 1
            return None
        try:
            row = json.loads(found)
        except json.JSONDecodeError as error:
            raise UserError(f"{name} is not JSON ({error.msg}); a .jsonl file holds one object per line.") from None
        if not isinstance(row, dict) or column not in row:
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{name} has no field {column!r}, only: {keys}; set corpus.text_column to one of them.")
        return text_of(row[column], name=name, column=column, dropped=dropped)

    return Row(name, text)


def _column_rows(file: Path, column: str, advance: Advance) -> Iterator[Row]:
    """The rows of a table, a batch at a time: of a parquet file, an Arrow stream (as datasets writes) or file."""
    size, number, told = file.stat().st_size, 0, 0
    with pyarrow.memory_map(str(file)) as source:
        num_rows, batches = _batches(file, source, column)
        for batch in batches:
            values = _encoded(batch)
            for value in values:
                number += 1
                yield _value_row(f"{file}:{number}", value, column)
            position = size * number // num_rows if num_rows else source.tell()
            advance(position - told)
            told = position


def _batches(file: Path, source: Any, column: str) -> tuple[int | None, Iterator[Any]]:
    """The number of rows where it is known, and the column in parts."""
    if file.suffix == ".parquet":
        table = pyarrow.parquet.ParquetFile(source, pre_buffer=False)
        _check_column(file, column, table.schema_arrow.names)
        parts = table.iter_batches(batch_size=ROWS_PER_BATCH, columns=[column], use_threads=False)
        return table.metadata.num_rows, (part.column(column) for part in parts)
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if is_file:
        opened = pyarrow.ipc.open_file(source)
        _check_column(file, column, opened.schema.names)
        return None, (opened.get_batch(number).column(column) for number in range(opened.num_record_batches))
    stream = pyarrow.ipc.open_stream(source)
    _check_column(file, column, stream.schema.names)
    return None, (part.column(column) for part in stream)


def _check_column(file: Path, column: str, found: list[str]) -> None:
    if column not in found:
        raise UserError(f"{file} has no column {column!r}, only: {', '.join(found)}; set corpus.text_column to one.")


def _encoded(values: Any) -> Any:
    """Strings as bytes, since Arrow does not check that they are UTF-8."""
    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    is_text = pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)
    return values.cast(pyarrow.large_binary()) if is_text else values


def _value_row(name: str, value: Any, column: str) -> Row:
    def text(dropped: Counter[str]) -> str | None:
        try:
            found = value.as_py()
            found = found.decode() if isinstance(found, bytes) else found
        except UnicodeDecodeError:
            dropped["not UTF-8"] += 1
            return None
        return text_of(found, name=name, column=column, dropped=dropped)

    return Row(name, text)


def size_of(files: list[Path]) -> int:
    """Bytes of all files."""
    return sum(os.path.getsize(file) for file in files)
