"""A task's share of the rows of a dataset, and what is wrong with them in one line that names file and row."""

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset

from gpt2x.config import CorpusSection
from gpt2x.corpus.chat_layouts import Layout, find_layout
from gpt2x.corpus.json_files import parsed_line
from gpt2x.corpus.paths import is_readable
from gpt2x.corpus.rows import (
    BUILDERS,
    Advance,
    Row,
    UnreadableError,
    check_column,
    open_dataset,
    open_rows,
    reading_errors,
    reason_of,
)
from gpt2x.corpus.text_files import rows_of
from gpt2x.errors import UserError

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".ndjson")


class DatasetShare(NamedTuple):
    """What a task reads of a dataset."""

    rows: Iterator[Row]
    num_rows: int | None
    """About how many; None where nobody knows."""
    layout: Layout | None
    """How the rows hold conversations; None where they are read as documents, and where there is no row."""


def open_share(
    corpus: CorpusSection,
    advance: Advance,
    *,
    task: int,
    num_tasks: int,
    revision: str | None = None,
    as_chat: bool,
) -> DatasetShare:
    """Opens a dataset and finds out which rows are a task's: some of its own shards where there are enough.

    Args:
        corpus: of kind dataset.
        advance: told how many rows have been read since it was told before.
        task: which share.
        num_tasks: how many there are.
        revision: the commit of a dataset of the Hub that all tasks read; by default the newest.
        as_chat: whether the rows are conversations.

    Raises:
        UserError: where there is no such dataset, configuration, split or column, for rows in no layout of
            conversations, and for files that cannot be read.
    """
    with _complaining(corpus, "", []):
        rows, columns, layout = _opened(corpus, revision, as_chat=as_chat)
    if isinstance(rows, Dataset):
        first = rows.num_rows // num_tasks * task + min(task, rows.num_rows % num_tasks)
        rows = (rows.select_columns(columns) if columns else rows).shard(num_tasks, task, contiguous=True)
        return DatasetShare(_rows(enumerate(rows, first), corpus, advance, layout), rows.num_rows, layout)
    num_rows = rows.info.splits[corpus.dataset_split].num_examples if _knows_its_length(rows, corpus) else None
    if rows.num_shards >= num_tasks:
        part = rows.shard(num_tasks, task, contiguous=False)
        # Nobody knows how many rows stand before a part.
        where = f" part {task} of {num_tasks}" if num_tasks > 1 else ""
        every = _rows(enumerate(part), corpus, advance, layout, where=where)
        return DatasetShare(every, num_rows and num_rows // num_tasks, layout)
    every = _rows(enumerate(rows), corpus, advance, layout)
    return DatasetShare(islice(every, task, None, num_tasks), num_rows, layout)


def _opened(
    corpus: CorpusSection, revision: str | None, *, as_chat: bool
) -> tuple[Dataset | IterableDataset, list[str], Layout | None]:
    """The rows, the columns that are read of them, and the layout of conversations."""
    if _is_json_lines(corpus):
        rows, _ = open_dataset(corpus, builder="text")
        named = ((row["text"], f"{corpus.dataset} row {number}") for number, row in enumerate(rows))
        found = next((list(_line(*line, corpus)) for line in named if line[0].strip()), [])
        if as_chat:
            return rows, [], _layout(corpus, found)
        check_column(corpus, found)
        return rows, [], None
    is_parquet = corpus.dataset == "parquet"
    first = dataclasses.replace(corpus, streaming=True) if is_parquet else corpus
    if not as_chat:
        rows, columns, layout = open_rows(first, revision=revision), [corpus.text_column], None
    else:
        rows, found = open_dataset(first, revision=revision)
        layout = _layout(corpus, found)
        columns = layout.columns_in(found, str(corpus.dataset)) if layout else found
    if is_parquet:  # of which the others are not even read
        rows, _ = open_dataset(corpus, columns=columns)
    return rows, columns, layout


def _layout(corpus: CorpusSection, columns: list[str]) -> Layout | None:
    return find_layout(columns, f"corpus.dataset ({corpus.dataset})") if columns else None


def _is_json_lines(corpus: CorpusSection) -> bool:
    """Whether the dataset is files of this machine with one JSON object per line. They are parsed here: datasets gives
    every column the type that it has in the first lines, and what is otherwise later on is an error, even where it is
    not read. (Its reader of lines cannot open http:// files.)"""
    are_lines = all(file.lower().endswith(LINES) and "://" not in file for file in corpus.data_files)
    return corpus.dataset == "json" and are_lines


def _knows_its_length(rows: IterableDataset, corpus: CorpusSection) -> bool:
    return bool(rows.info.splits) and corpus.dataset_split in rows.info.splits


def _rows(
    rows: Iterable[tuple[int, dict[str, Any]]],
    corpus: CorpusSection,
    advance: Advance,
    layout: Layout | None,
    *,
    where: str = "",
) -> Iterator[Row]:
    """Names rows by their number."""
    is_lines, read = _is_json_lines(corpus), [0]
    with _complaining(corpus, where, read):
        for number, row in rows:
            name = f"{corpus.dataset}{where} row {number}"
            if is_lines:
                if row["text"].strip():
                    yield _line_row(name, row["text"], corpus, layout)
            else:
                yield _row(name, row if layout else _column_of(row, corpus.text_column))
            read[0] = number + 1
            advance(1)


def _line_row(name: str, line: str, corpus: CorpusSection, layout: Layout | None) -> Row:
    def columns(dropped: Counter[str]) -> dict[str, Any]:
        found = _line(line, name, corpus)
        return found if layout else _column_of(found, corpus.text_column)

    return Row(name, columns)


def _line(line: str, name: str, corpus: CorpusSection) -> dict[str, Any]:
    try:
        return parsed_line(line, name)
    except UserError as error:
        raise UserError(_fault(corpus) or str(error)) from None


def _column_of(row: dict[str, Any], column: str) -> dict[str, Any]:
    """A row of a stream may lack the column; that is a row without text."""
    return {column: row.get(column)}


def _row(name: str, columns: dict[str, Any]) -> Row:
    return Row(name, lambda dropped: columns)


@contextmanager
def _complaining(corpus: CorpusSection, where: str, read: list[int]) -> Iterator[None]:
    """What reading raises becomes a line that names file and row, as far as they can be found.

    Args:
        corpus: of kind dataset.
        where: the part of it that is read.
        read: how many rows were read before.
    """
    try:
        yield
    except ConnectionError as error:
        raise UserError(
            f"corpus.dataset ({corpus.dataset}): {reason_of(error)}; try again when it can be reached."
        ) from None
    except UnreadableError as error:
        raise UserError(_fault(corpus) or str(error)) from None
    except UserError:
        raise
    except reading_errors() as error:
        place = f"{where} behind row {read[0] - 1}" if read and read[0] else where
        reason = f"corpus.dataset ({corpus.dataset}) cannot be read{place}: {reason_of(error)}; repair its files."
        raise UserError(_fault(corpus) or reason) from None


def _fault(corpus: CorpusSection) -> str | None:
    """What is wrong with one of a builder's files on this machine: they are read again, by what knows their lines."""
    if corpus.dataset not in BUILDERS:
        return None
    for file in _local_files(corpus):
        dropped: Counter[str] = Counter()
        try:
            for row in rows_of(file, corpus, lambda _: None):
                if isinstance(row, Row):
                    row.columns(dropped)
                if dropped:
                    return f"{row.name} is not UTF-8; repair it or leave the file out of corpus.data_files."
        except UserError as error:
            return str(error)
    return None


def _local_files(corpus: CorpusSection) -> list[Path]:
    found = [[file] if os.path.lexists(file) else sorted(glob.glob(file)) for file in corpus.data_files]
    return [Path(file) for files in found for file in files if is_readable(Path(file))]
