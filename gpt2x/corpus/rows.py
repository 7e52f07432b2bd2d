"""Rows: what one is, the rows of a dataset, and the text in a row's column.

The reader of datasets is the `datasets` library: a Hub id, or a builder (json, parquet, arrow, text) of local or
remote files.
"""

import glob
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from textwrap import shorten
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowException

from gpt2x.config import CorpusSection
from gpt2x.corpus.paths import BUILDERS
from gpt2x.corpus.values import is_unicode, listed, shown
from gpt2x.errors import UserError

Advance = Callable[[int], None]


class UnreadableError(UserError):
    """A dataset that is not there, or whose files are not what they should be."""


class Row(NamedTuple):
    """What may become one document. It is not looked at before it is asked for its columns, so that a task which
    reads every n-th row parses no other."""

    name: str
    """Path of the file or name of the dataset, with the number of the line or row where it holds many."""
    columns: Callable[[Counter[str]], dict[str, Any] | None]
    """Gives the columns; or None after counting why there are none."""


def open_rows(corpus: CorpusSection, *, revision: str | None = None) -> Dataset | IterableDataset:
    """Opens the split of a dataset; reads at most its first row. Code that comes with a dataset is never run.

    Args:
        corpus: of kind dataset.
        revision: the commit of a dataset of the Hub; by default the newest.

    Raises:
        UserError: where there is no such dataset, configuration, split or column, and for files that cannot be read.
        ConnectionError: where the dataset is elsewhere and cannot be reached; trying again may help.
    """
    rows, found = open_dataset(corpus, revision=revision)
    check_column(corpus, found)
    return rows


def check_column(corpus: CorpusSection, found: Sequence[str]) -> None:
    """Raises UserError where rows were found, and no column of texts in them."""
    if found and corpus.text_column not in found:
        raise UserError(
            f"corpus.dataset ({corpus.dataset}) has no column {corpus.text_column!r}, only: {listed(found)}; "
            f"set corpus.text_column to one of them."
        )


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
        raise UnreadableError(_complaint(corpus, error)) from None
    except (StopIteration, RuntimeError) as error:
        if not isinstance(error, StopIteration) and not isinstance(error.__cause__, StopIteration):
            raise
        raise UserError(
            f"corpus.dataset ({corpus.dataset}) holds no row; correct corpus.data_files or dataset_split."
        ) from None


def _complaint(corpus: CorpusSection, error: Exception) -> str:
    return (
        f"corpus.dataset ({corpus.dataset}) cannot be read: {reason_of(error)}; correct corpus.dataset, "
        f"dataset_config, dataset_split or data_files."
    )


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


def text_of(value: Any, *, name: str, column: str, dropped: Counter[str] | None = None) -> str | None:
    """The text of a row.

    Args:
        value: what the column holds: a text, null, or a list of chat messages with role and content, whose contents
            are joined by blank lines.
        name: of the row, for messages.
        column: its name, for messages.
        dropped: counts the rows that are left out, by reason.

    Returns:
        The text; None for a row to leave out: null, empty, nothing but whitespace, or no Unicode (lone surrogates,
        which JSON can spell and no UTF-8 and no tokenizer can).

    Raises:
        UserError: for any other value.
    """
    text = _joined(value) if isinstance(value, list) else value
    if text is None or (isinstance(text, str) and (not text or text.isspace())):
        reason = "empty"
    elif not isinstance(text, str):
        raise UserError(
            f"{name}: field {column!r} must hold text or chat messages, not {shown(value)}; set corpus.text_column "
            f"to another."
        )
    elif text.isascii() or is_unicode(text):
        return text
    else:
        reason = "not UTF-8"
    if dropped is not None:
        dropped[reason] += 1
    return None


def _joined(messages: list[Any]) -> str | list[Any]:
    """The contents of chat messages; what is no chat is given back as it is."""
    contents = [message.get("content") if isinstance(message, dict) else message for message in messages]
    if not all(isinstance(message, dict) for message in messages):
        return messages
    if not all(isinstance(content, str | None) for content in contents):
        return messages
    return "\n\n".join(content for content in contents if content)
