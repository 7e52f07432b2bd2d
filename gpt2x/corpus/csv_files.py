"""Rows of .csv and .tsv files, whose first row names the columns. Every value is the text that stands there."""

import csv
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from gpt2x.corpus.opened_files import MAX_ROW_BYTES, OpenedFile, read_line, too_long
from gpt2x.corpus.rows import Advance, Row
from gpt2x.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}


# Not pandas' or datasets' reader: they take NA and null for nothing and 007 for 7, and name no line.
def csv_rows(file: Path, delimiter: str, advance: Advance) -> Generator[Row, None, None]:
    """The rows of a table of text, named by the line they begin in.

    Raises:
        UserError: for a row with more or fewer cells than there are columns, quotes that do not match, and columns of
            the same name.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    with OpenedFile(file) as opened:
        reader = csv.reader(_texts(opened, file), delimiter=delimiter, strict=True)
        header: list[str] = []
        line = 1
        for cells in _rows(reader, file):
            if cells and not header:
                header = _header(cells, file)
            elif cells:
                if len(cells) != len(header):
                    raise UserError(
                        f"{file}:{line} has {len(cells)} cells, and there are {len(header)} columns; correct the row, "
                        f"or quote what holds a separator."
                    )
                yield _row(f"{file}:{line}", header, cells)
            line = reader.line_num + 1
            opened.tell(advance)


def csv_columns(file: Path, delimiter: str) -> list[str]:
    """The names of the columns; none where there is no row."""
    with OpenedFile(file) as opened:
        reader = csv.reader(_texts(opened, file), delimiter=delimiter, strict=True)
        return next((_header(cells, file) for cells in _rows(reader, file) if cells), [])


def _texts(opened: OpenedFile, file: Path) -> Iterator[str]:
    """Lines; what is not UTF-8 becomes half of a surrogate pair, which leaves out the row that has it in its text."""
    number = 1
    while line := read_line(opened, file, number):
        yield line.decode("utf-8", errors="surrogateescape")
        number += 1


def _rows(reader: Iterator[list[str]], file: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        line = reader.line_num  # type: ignore[attr-defined]
        if "field limit" in str(error):
            raise too_long(f"{file}:{line}") from None
        raise UserError(f"{file}:{line} is no CSV ({error}); double the quotes inside of quotes.") from None


def _header(cells: list[str], file: Path) -> list[str]:
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice is not None:
        raise UserError(f"{file} has {cells.count(twice)} columns {twice!r}; rename all but one.")
    return cells


def _row(name: str, header: Sequence[str], cells: Sequence[str]) -> Row:
    columns = dict(zip(header, cells, strict=True))
    return Row(name, lambda dropped: columns)
