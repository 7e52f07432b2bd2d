"""Tables: .csv and .tsv, whose first row names the columns; parquet, Arrow streams (as datasets writes) and files."""

import csv
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from gpt2x.corpus.rows import Advance, Row
from gpt2x.corpus.source_files import kind_of
from gpt2x.corpus.text_files import MAX_ROW_BYTES, OpenedFile, too_long
from gpt2x.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
ROWS_PER_BATCH = 128
# Where rows are long, a batch has as many fewer.
BYTES_PER_BATCH = 32_000_000


# Not pandas' or datasets' reader: they take NA and null for nothing and 007 for 7, and name no line.
def csv_rows(file: Path, delimiter: str, advance: Advance) -> Generator[Row, None, None]:
    """The rows of a table of text, named by the line they begin in. Every value is the text that stands there.

    Raises:
        UserError: for a row with more or fewer cells than there are columns, quotes that do not match, and columns of
            the same name.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    with OpenedFile(file) as opened:
        reader = csv.reader(_texts(opened), delimiter=delimiter, strict=True)
        header: list[str] = []
        line = 1
        for cells in _cells(reader, file):
            if cells and not header:
                header = cells
                _check_names(header, header, file)
            elif cells:
                if len(cells) != len(header):
                    raise UserError(
                        f"{file}:{line} has {len(cells)} cells, and there are {len(header)} columns; correct the row, "
                        f"or quote what holds a separator."
                    )
                yield Row.of(f"{file}:{line}", dict(zip(header, cells)))
            line = reader.line_num + 1
            opened.tell(advance)


def csv_columns(file: Path, delimiter: str) -> list[str]:
    """The names of the columns; none where there is no row."""
    with OpenedFile(file) as opened:
        reader = csv.reader(_texts(opened), delimiter=delimiter, strict=True)
        header = next((cells for cells in _cells(reader, file) if cells), [])
        _check_names(header, header, file)
        return header


def _texts(opened: OpenedFile) -> Iterator[str]:
    """Lines; what is not UTF-8 becomes half of a surrogate pair, which leaves out the row that has it in its text."""
    number = 1
    while line := opened.read_line(number):
        yield line.decode("utf-8", errors="surrogateescape")
        number += 1


def _cells(reader: Iterator[list[str]], file: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        line = reader.line_num  # type: ignore[attr-defined]
        if "field limit" in str(error):
            raise too_long(f"{file}:{line}") from None
        raise UserError(f"{file}:{line} is no CSV ({error}); double the quotes inside of quotes.") from None


def _check_names(columns: Sequence[str], found: list[str], file: Path) -> None:
    for column in columns:
        if found.count(column) > 1:
            raise UserError(f"{file} has {found.count(column)} columns {column!r}; rename all but one.")


def table_columns(file: Path) -> list[str]:
    """The names of a table's columns; reads no row."""
    with pyarrow.memory_map(str(file)) as source:
        if kind_of(file) == ".parquet":
            return pyarrow.parquet.ParquetFile(source).schema_arrow.names
        return _arrow(source).schema.names


def table_rows(file: Path, columns: Sequence[str], advance: Advance) -> Iterator[Row]:
    """The rows of a table, a batch at a time.

    Args:
        file: .parquet or .arrow.
        columns: what is read of it; there must be such.
        advance: told how many bytes of the file have been read since it was told before.

    Raises:
        UserError: where there are several of a name.
    """
    _check_names(columns, table_columns(file), file)
    size, number, told = file.stat().st_size, 0, 0
    with pyarrow.memory_map(str(file)) as source:
        num_rows, batches = _batches(file, source, list(columns))
        for batch in batches:
            for values in zip(*(_encoded(batch.column(column)) for column in columns), strict=True):
                number += 1
                yield Row(f"{file}:{number}", partial(_decoded, f"{file}:{number}", columns, values))
            position = size * number // num_rows if num_rows else source.tell()
            advance(position - told)
            told = position


def _batches(file: Path, source: Any, columns: list[str]) -> tuple[int | None, Iterator[Any]]:
    """The number of rows where it is known, and the rows in parts."""
    if kind_of(file) == ".parquet":
        table = pyarrow.parquet.ParquetFile(source, pre_buffer=False)
        parts = table.iter_batches(
            batch_size=_rows_per_batch(file, table.metadata, columns), columns=columns, use_threads=False
        )
        return table.metadata.num_rows, parts
    opened = _arrow(source)
    if isinstance(opened, pyarrow.ipc.RecordBatchFileReader):
        return None, (opened.get_batch(number) for number in range(opened.num_record_batches))
    return None, iter(opened)


def _rows_per_batch(file: Path, metadata: Any, columns: list[str]) -> int:
    """By the row group with the longest rows; refused before they are read, where they are too long on the average."""
    longest = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        parts = (group.column(place) for place in range(group.num_columns))
        size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)
        longest = max(longest, size // max(group.num_rows, 1))
    if longest > MAX_ROW_BYTES:
        raise too_long(f"a row of '{file}'")
    return max(1, min(ROWS_PER_BATCH, BYTES_PER_BATCH // longest))


def _arrow(source: Any) -> Any:
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    return pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)


def _encoded(values: Any) -> Any:
    """Strings as bytes, since Arrow does not check that they are UTF-8."""
    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    is_text = pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)
    return values.cast(pyarrow.large_binary()) if is_text else values


def _decoded(name: str, columns: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return {column: _plain(value, name) for column, value in zip(columns, values, strict=True)}


def _plain(value: Any, name: str) -> Any:
    is_binary = value.is_valid and isinstance(value, pyarrow.BinaryScalar)
    if is_binary and value.as_buffer().size > MAX_ROW_BYTES:
        raise too_long(name)
    found = value.as_py()
    return found.decode() if isinstance(found, bytes) else found
