"""Tables of rows: parquet, Arrow streams (as datasets writes) and Arrow files."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from gpt2x.corpus.opened_files import MAX_ROW_BYTES, too_long
from gpt2x.corpus.paths import kind_of
from gpt2x.corpus.rows import Advance, Row
from gpt2x.errors import UserError

ROWS_PER_BATCH = 128
# Where rows are long, a batch has as many fewer.
BYTES_PER_BATCH = 32_000_000


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
    found = table_columns(file)
    for column in columns:
        if found.count(column) > 1:
            raise UserError(f"{file} has {found.count(column)} columns {column!r}; rename all but one.")
    size, number, told = file.stat().st_size, 0, 0
    with pyarrow.memory_map(str(file)) as source:
        num_rows, batches = _batches(file, source, list(columns))
        for batch in batches:
            for values in zip(*(_encoded(batch.column(column)) for column in columns), strict=True):
                number += 1
                yield _table_row(f"{file}:{number}", columns, values)
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


def _table_row(name: str, columns: Sequence[str], values: Sequence[Any]) -> Row:
    def found(dropped: Counter[str]) -> dict[str, Any] | None:
        try:
            return {column: _plain(value, name) for column, value in zip(columns, values, strict=True)}
        except UnicodeDecodeError:
            dropped["not UTF-8"] += 1
            return None

    return Row(name, found)


def _plain(value: Any, name: str) -> Any:
    is_binary = value.is_valid and isinstance(value, pyarrow.BinaryScalar)
    if is_binary and value.as_buffer().size > MAX_ROW_BYTES:
        raise too_long(name)
    found = value.as_py()
    return found.decode() if isinstance(found, bytes) else found
