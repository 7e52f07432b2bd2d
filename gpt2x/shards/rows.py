"""Rows: what one is, the rows of a dataset, and the text in a row's column.

The reader of datasets is the `datasets` library: a Hub id, or a builder (json, parquet, arrow, text) of local or
remote files.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from gpt2x.config import CorpusSection
from gpt2x.errors import UserError
from gpt2x.shards.values import is_unicode, shown

# Without files these read the current directory, whatever is there.
BUILDERS = ("json", "parquet", "arrow", "text", "csv")

Advance = Callable[[int], None]


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
    if found and corpus.text_column not in found:
        raise UserError(
            f"corpus.dataset ({corpus.dataset}) has no column {corpus.text_column!r}, only: {', '.join(found)}; "
            f"set corpus.text_column to one of them."
        )
    return rows


def open_dataset(corpus: CorpusSection, *, revision: str | None = None) -> tuple[Dataset | IterableDataset, list[str]]:
    """Opens the split of a dataset as open_rows does, and finds its columns: none where it has no row to tell them.

    Raises:
        UserError: where there is no such dataset, configuration or split, and for files that cannot be read.
        ConnectionError: where the dataset is elsewhere and cannot be reached; trying again may help.
    """
    assert corpus.dataset is not None, "a corpus of kind dataset names one"
    if corpus.dataset in BUILDERS and not corpus.data_files:
        raise UserError(f"corpus.dataset ({corpus.dataset}) reads files; name them in corpus.data_files.")
    try:
        rows = load_dataset(
            corpus.dataset,
            name=corpus.dataset_config,
            data_files=corpus.data_files or None,
            split=corpus.dataset_split,
            streaming=corpus.streaming,
            revision=revision,
        )
        return rows, rows.column_names or list(next(iter(rows.take(1)), {}))
    except (FileNotFoundError, ValueError, DatasetGenerationError) as error:
        raise UserError(_complaint(corpus, error)) from None


def _complaint(corpus: CorpusSection, error: Exception) -> str:
    reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
    return (
        f"corpus.dataset ({corpus.dataset}) cannot be read: {reason}; correct corpus.dataset, dataset_config, "
        f"dataset_split or data_files."
    )


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
