"""The rows of a dataset, a task's share of them, and what is wrong with them in one line that names file and row.

The reader is the `datasets` library: a Hub id, or a builder (json, parquet, arrow, text) of local or remote files.
"""

import dataclasses
import glob
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from pyarrow import ArrowException

from gpt2x.config import CorpusSection
from gpt2x.corpus.file_rows import parsed_line, rows_of
from gpt2x.corpus.layouts import Layout, TextColumn
from gpt2x.corpus.rows import Advance, Row, Share
from gpt2x.corpus.source_files import BUILDERS, is_readable
from gpt2x.corpus.text_files import unheard
from gpt2x.errors import UserError

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".ndjson")


FindLayout = Callable[[Sequence[str], str], Layout | TextColumn | None]
"""How rows with these columns, of a corpus of this name, hold documents; None where there is no column."""


class UnreadableError(UserError):
    """A dataset that is not there, or whose files are not what they should be."""


class DatasetShare(NamedTuple):
    """What a task reads of a dataset."""

    rows: Iterator[Row]
    size: int | None
    """About how many; None where nobody knows."""
    layout: Layout | TextColumn | None
    """How they hold documents; None where there is no row."""


def dataset_revision(corpus: CorpusSection) -> str | None:
    """The newest commit of a dataset of the Hub; None for any other corpus, and where nobody answers."""
    if corpus.kind != "dataset" or corpus.dataset in BUILDERS or Path(str(corpus.dataset)).exists():
        return None
    try:
        return HfApi().dataset_info(str(corpus.dataset), timeout=10).sha
    except broken_connections():  # whoever reads the dataset will say what is wrong
        return None


def open_share(corpus: CorpusSection, advance: Advance, share: Share, *, find_layout: FindLayout) -> DatasetShare:
    """Opens a dataset and finds out which rows are a task's: some of its own shards where there are enough.

    Args:
        corpus: of kind dataset.
        advance: told how many rows have been read since it was told before.
        share: which part.
        find_layout: tells how the rows hold documents.

    Raises:
        UserError: where there is no such dataset, configuration, split or column, for rows in no layout of
            conversations, and for files that cannot be read.
    """
    task, num_tasks = share.task, share.num_tasks
    with _complaining(corpus, "", []):
        rows, layout = _opened(corpus, share.revision, find_layout)
    if isinstance(rows, Dataset):
        first = rows.num_rows // num_tasks * task + min(task, rows.num_rows % num_tasks)
        rows = rows.shard(num_tasks, task, contiguous=True)
        return DatasetShare(_rows(enumerate(rows, first), corpus, advance, layout), rows.num_rows, layout)
    splits = rows.info.splits or {}
    num_rows = splits[corpus.dataset_split].num_examples if corpus.dataset_split in splits else None
    if rows.num_shards >= num_tasks:
        part = rows.shard(num_tasks, task, contiguous=False)
        # Nobody knows how many rows stand before a part.
        where = f" part {task} of {num_tasks}" if num_tasks > 1 else ""
        every = _rows(enumerate(part), corpus, advance, layout, where=where)
        return DatasetShare(every, num_rows and num_rows // num_tasks, layout)
    every = _rows(enumerate(rows), corpus, advance, layout)
    return DatasetShare(islice(every, task, None, num_tasks), num_rows, layout)


def _opened(
    corpus: CorpusSection, revision: str | None, find_layout: FindLayout
) -> tuple[Dataset | IterableDataset, Layout | TextColumn | None]:
    """The rows, with the columns that their layout reads of them, and that."""
    if are_lines := _is_json_lines(corpus):
        rows, _ = open_dataset(corpus, builder="text")
        named = ((row["text"], f"{corpus.dataset} row {number}") for number, row in enumerate(rows))
        found = next((list(_line(*line, corpus)) for line in named if line[0].strip()), [])
    else:
        # Of parquet the columns that are not wanted are not even read.
        streams = corpus.streaming or corpus.dataset == "parquet"
        rows, found = open_dataset(dataclasses.replace(corpus, streaming=streams), revision=revision)
    name = f"corpus.dataset ({corpus.dataset})"
    layout = find_layout(found, name)
    columns = layout.columns_in(found, name) if layout and found else []
    if corpus.dataset == "parquet":
        rows, _ = open_dataset(corpus, columns=columns)
    elif isinstance(rows, Dataset) and columns and not are_lines:
        rows = rows.select_columns(columns)
    return rows, layout


def _is_json_lines(corpus: CorpusSection) -> bool:
    """Whether the dataset is files of this machine with one JSON object per line. They are parsed here: datasets gives
    every column the type that it has in the first lines, and what is otherwise later on is an error, even where it is
    not read. (Its reader of lines cannot open http:// files.)"""
    are_lines = all(file.lower().endswith(LINES) and "://" not in file for file in corpus.data_files)
    return corpus.dataset == "json" and are_lines


def _rows(
    rows: Iterable[tuple[int, dict[str, Any]]],
    corpus: CorpusSection,
    advance: Advance,
    layout: Layout | TextColumn | None,
    *,
    where: str = "",
) -> Iterator[Row]:
    """Names rows by their number."""
    are_lines, read = _is_json_lines(corpus), [0]
    with _complaining(corpus, where, read):
        for number, row in rows:
            name = f"{corpus.dataset}{where} row {number}"
            if not are_lines:
                yield Row.of(name, _columns(row, layout))
            elif row["text"].strip():
                yield Row(name, partial(_line_columns, row["text"], name, corpus, layout))
            read[0] = number + 1
            advance(1)


def _line_columns(line: str, name: str, corpus: CorpusSection, layout: Layout | TextColumn | None) -> dict[str, Any]:
    return _columns(_line(line, name, corpus), layout)


def _columns(row: dict[str, Any], layout: Layout | TextColumn | None) -> dict[str, Any]:
    """A row of a stream may lack the column; that is a row without text."""
    return {layout.column: row.get(layout.column)} if isinstance(layout, TextColumn) else row


def _line(line: str, name: str, corpus: CorpusSection) -> dict[str, Any]:
    try:
        return parsed_line(line, name)
    except UserError as error:
        raise UserError(_fault(corpus) or str(error)) from None


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
        try:
            for row in rows_of(file, corpus, unheard, TextColumn(column=corpus.text_column)):
                if isinstance(row, Row):
                    row.columns()
        except UnicodeDecodeError:
            return f"{row.name} is not UTF-8; repair it or leave the file out of corpus.data_files."
        except UserError as error:
            return str(error)
    return None


def _local_files(corpus: CorpusSection) -> list[Path]:
    found = [[file] if os.path.lexists(file) else sorted(glob.glob(file)) for file in corpus.data_files]
    return [Path(file) for files in found for file in files if is_readable(Path(file))]


def open_rows(corpus: CorpusSection) -> Dataset | IterableDataset:
    """Opens the split of a dataset; reads at most its first row. Code that comes with a dataset is never run.

    Args:
        corpus: of kind dataset.

    Raises:
        UserError: where there is no such dataset, configuration, split or column, and for files that cannot be read.
        ConnectionError: where the dataset is elsewhere and cannot be reached; trying again may help.
    """
    rows, found = open_dataset(corpus)
    if found:
        TextColumn(column=corpus.text_column).columns_in(found, f"corpus.dataset ({corpus.dataset})")
    return rows


def open_dataset(
    corpus: CorpusSection,
    *,
    revision: str | None = None,
    builder: str | None = None,
    columns: Sequence[str] | None = None,
) -> tuple[Dataset | IterableDataset, list[str]]:
    """Opens the split of a dataset as open_rows does, and finds its columns: none where it has no row to tell them.

    Args:
        corpus: of kind dataset.
        revision: the commit of a dataset of the Hub; by default the newest.
        builder: reads the files in place of the corpus' own.
        columns: all that is read of parquet files; they must be there.

    Raises:
        UserError: where there is no such dataset, configuration, split or row, and for files that cannot be read.
        ConnectionError: where the dataset is elsewhere and cannot be reached; trying again may help.
    """
    assert corpus.dataset is not None, "a corpus of kind dataset names one"
    if corpus.dataset in BUILDERS and not corpus.data_files:
        raise UserError(f"corpus.dataset ({corpus.dataset}) reads files; name them in corpus.data_files.")
    # What exists is meant, whatever letters its name has.
    files = [glob.escape(file) if os.path.lexists(file) else file for file in corpus.data_files]
    options: dict[str, Any] = {} if columns is None else {"columns": list(columns)}
    if builder == "text":  # so that no row at all is no mistake
        options["features"] = Features({"text": Value("string")})
    try:
        rows = load_dataset(
            builder or corpus.dataset,
            name=corpus.dataset_config,
            data_files=files or None,
            split=corpus.dataset_split,
            streaming=corpus.streaming,
            revision=revision,
            **options,
        )
        return rows, rows.column_names or list(next(iter(rows.take(1)), {}))
    except (FileNotFoundError, ValueError, DatasetGenerationError) as error:
        raise UnreadableError(
            f"corpus.dataset ({corpus.dataset}) cannot be read: {reason_of(error)}; correct corpus.dataset, "
            f"dataset_config, dataset_split or data_files."
        ) from None
    except (StopIteration, RuntimeError) as error:
        if not isinstance(error, StopIteration) and not isinstance(error.__cause__, StopIteration):
            raise
        raise UserError(
            f"corpus.dataset ({corpus.dataset}) holds no row; correct corpus.data_files or dataset_split."
        ) from None


def reason_of(error: BaseException) -> str:
    """An error, or what caused it, in one line."""
    found = error.__cause__ or error
    # Where Arrow cannot parse JSON, datasets opens the file anew in a way that it cannot open http:// files.
    if isinstance(found, TypeError) and "encoding" in str(found):
        return "a row is no JSON, or of another type than those before"
    line = " ".join(str(found).split()).replace("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set")
    return shorten(line.rstrip("."), 150, placeholder=" ...") or type(found).__name__


def broken_connections() -> tuple[type[BaseException], ...]:
    """What broken connections raise: OSErrors, and those of libraries that are loaded; others cannot have raised."""
    roots = {"httpx": "HTTPError", "httpx2": "HTTPError", "aiohttp": "ClientError"}
    loaded = [getattr(sys.modules[module], name) for module, name in roots.items() if module in sys.modules]
    return (OSError, *loaded)


def reading_errors() -> tuple[type[BaseException], ...]:
    """What reading a dataset's rows raises where they are not what they should be, or are gone."""
    return (ValueError, TypeError, EOFError, zlib.error, ArrowException, DatasetGenerationError, *broken_connections())
