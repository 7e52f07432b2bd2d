"""Where documents come from, which of them a task reads, and on which side of the split each one falls."""

import hashlib
import io
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gpt2x.config import CorpusSection
from gpt2x.corpus.chat_layouts import Layout, find_layout
from gpt2x.corpus.cutting import CHARACTERS_PER_PIECE, as_whole, chunks_of, cut, pieces_of
from gpt2x.corpus.dataset_rows import open_share
from gpt2x.corpus.docstrings import conversations
from gpt2x.corpus.paths import kind_of
from gpt2x.corpus.rows import Advance, Row, text_of
from gpt2x.corpus.source_files import source_files
from gpt2x.corpus.text_files import LongFile, columns_of, rows_of, size_of
from gpt2x.corpus.values import listed
from gpt2x.errors import UserError


class Piece(NamedTuple):
    """A document, or a part of a long one. The parts of a document follow each other."""

    name: str
    """Path of the file, with the line number where a file holds many documents."""
    text: str
    is_validation: bool
    """Whether the whole document is held out."""
    is_last: bool
    """Whether the document ends here."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of a corpus a task reads."""

    task: int = 0
    num_tasks: int = 1
    revision: str | None = None
    """The commit of a dataset of the Hub that all tasks read; by default the newest."""


WHOLE = Share()


class Reading(NamedTuple):
    """A share of a corpus that is about to be read."""

    rows: Iterator[Row | LongFile]
    size: int | None
    """How much there is to read, in the unit; None where nobody knows."""
    unit: str
    """Of the size: B or rows."""
    layout: Layout | None = None
    """How the rows hold conversations; None where they are read as documents, and where there is no row."""


def is_validation(text: str, corpus: CorpusSection) -> bool:
    """Whether a document is held out: a function of its text and the split's seed, so duplicates stay together."""
    digest = _split_hash(corpus)
    for chunk in chunks_of(text):
        digest.update(chunk.encode())
    return _is_held_out(digest, corpus)


def _split_hash(corpus: CorpusSection) -> Any:
    return hashlib.blake2b(digest_size=8, person=b"gpt2x split", key=str(corpus.split_seed).encode())


def _is_held_out(digest: Any, corpus: CorpusSection) -> bool:
    return int.from_bytes(digest.digest(), "little") < corpus.validation_fraction * 2**64


def read_pieces(reading: Reading, corpus: CorpusSection, *, dropped: Counter[str], cuts: bool) -> Iterator[Piece]:
    """The documents of a share, long ones in pieces, in an order that the file system has no say in.

    Texts are what the bytes say, line ends too, without a byte order mark. Documents without anything but whitespace
    and documents that are not UTF-8 are left out.

    Args:
        reading: what to read.
        corpus: decides what is held out.
        dropped: counts what was left out, by reason.
        cuts: whether long documents may be cut.

    Raises:
        UserError: for a file that is not what its name says, a broken .jsonl line, a missing column.
    """
    for row in reading.rows:
        if isinstance(row, LongFile):
            yield from _long_file(row, corpus, dropped=dropped, cuts=cuts)
            continue
        text = _text(row, corpus, dropped)
        if text is not None:
            parts = pieces_of(text) if cuts else iter((as_whole([text], row.name),))
            yield from _as_pieces(row.name, parts, is_validation(text, corpus))


def _text(row: Row, corpus: CorpusSection, dropped: Counter[str]) -> str | None:
    columns, column = row.columns(dropped), corpus.text_column
    if columns is None:
        return None
    if column not in columns:
        raise UserError(
            f"{row.name} has no field {column!r}, only: {listed(columns)}; set corpus.text_column to one of them."
        )
    return text_of(columns[column], name=row.name, column=column, dropped=dropped)


def _as_pieces(name: str, parts: Iterator[str], held_out: bool) -> Iterator[Piece]:
    part = next(parts)
    for following in parts:
        yield Piece(name, part, held_out, False)
        part = following
    yield Piece(name, part, held_out, True)


def _long_file(row: LongFile, corpus: CorpusSection, *, dropped: Counter[str], cuts: bool) -> Iterator[Piece]:
    """Reads the document twice, since the side it falls on is known at its end."""
    digest, is_empty = _split_hash(corpus), True
    try:
        for text in _chunks(row, lambda _: None):
            digest.update(text.encode())
            is_empty = is_empty and text.isspace()
    except UnicodeDecodeError:
        dropped["not UTF-8"] += 1
        return
    if is_empty:
        dropped["empty"] += 1
        return
    chunks = _chunks(row, row.advance)
    parts = cut(chunks) if cuts else iter((as_whole(chunks, row.name),))
    yield from _as_pieces(row.name, parts, _is_held_out(digest, corpus))


def _chunks(row: LongFile, advance: Advance) -> Iterator[str]:
    """In slices as those of chunks_of, so that it makes no difference what a text is read from."""
    with row.open() as opened:
        text = io.TextIOWrapper(opened.stream, encoding="utf-8", newline="")
        try:
            while chunk := text.read(CHARACTERS_PER_PIECE):
                yield chunk
                opened.tell(advance)
        finally:
            text.detach()


def open_corpus(
    corpus: CorpusSection,
    advance: Advance,
    *,
    share: Share = WHOLE,
    as_chat: bool = False,
    files: Mapping[str, Path] | None = None,
    read: Callable[[Path], None] = lambda _: None,
) -> Reading:
    """Finds out what a task has to read. It is told which part, and finds it without reading the others if it can.

    The files are dealt out in turn where there are enough for every task, a dataset's own shards likewise; else each
    task takes every num_tasks-th row.

    Args:
        corpus: what to read.
        advance: told how much of Reading.size has been read since it was told before.
        share: which part.
        as_chat: whether the rows are conversations; the first row of the whole corpus says in which layout.
        files: those of the corpus, as source_files finds them.
        read: told of each file that was read to its end.

    Raises:
        UserError: for a path that matches no file, an unknown kind of file, a dataset that cannot be opened; and for
            rows in no layout of conversations.
    """
    files = source_files(corpus) if files is None else files
    if corpus.kind == "dataset":
        reading = _open_dataset(corpus, advance, share, as_chat=as_chat)
        return reading._replace(rows=_told_at_the_end(reading.rows, files, read))
    every = list(files.values())
    layout = _layout_of(every, corpus) if as_chat else None
    if len(every) >= share.num_tasks:
        own = every[share.task :: share.num_tasks]
        return Reading(_rows(own, corpus, advance, layout, read), size_of(own), "B", layout)
    rows = islice(_rows(every, corpus, advance, layout, read), share.task, None, share.num_tasks)
    return Reading(rows, size_of(every), "B", layout)


def _told_at_the_end(
    rows: Iterator[Row | LongFile], files: Mapping[str, Path], read: Callable[[Path], None]
) -> Iterator[Row | LongFile]:
    yield from rows
    for file in files.values():
        read(file)


def _layout_of(files: list[Path], corpus: CorpusSection) -> Layout | None:
    """That of the first row; None where there is no row."""
    if corpus.kind == "python_docstrings":
        return find_layout(["messages"], corpus.kind)
    for file in files:
        if kind_of(file) == ".txt":
            raise UserError(
                f"corpus.paths: '{file}' has no columns, and chat reads conversations from columns; give .jsonl, "
                f".json, .csv, .tsv, .parquet or .arrow, or leave chat out."
            )
    return next((find_layout(found, str(file)) for file in files if (found := columns_of(file))), None)


def size_to_read(
    corpus: CorpusSection, tasks: Sequence[int], *, num_tasks: int, files: Mapping[str, Path], as_chat: bool = False
) -> tuple[int | None, str]:
    """How much these tasks have to read in all, None where nobody knows; and its unit."""
    if corpus.kind == "dataset":
        reading = _open_dataset(corpus, lambda _: None, Share(task=tasks[0], num_tasks=num_tasks), as_chat=as_chat)
        return reading.size and reading.size * len(tasks), reading.unit
    every = list(files.values())
    if len(every) < num_tasks:
        return size_of(every) * len(tasks), "B"
    return sum(size_of(every[task::num_tasks]) for task in tasks), "B"


def _rows(
    files: list[Path],
    corpus: CorpusSection,
    advance: Advance,
    layout: Layout | None,
    read: Callable[[Path], None],
) -> Iterator[Row | LongFile]:
    for file in files:
        if corpus.kind == "python_docstrings":
            yield from _docstring_rows(file)
            advance(file.stat().st_size)
        else:
            yield from rows_of(file, corpus, advance, layout=layout)
        read(file)


def _docstring_rows(file: Path) -> Iterator[Row]:
    parts = file.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
    for name, messages in conversations(file, ".".join(part for part in parts if part != "__init__")):
        columns = {"messages": messages}
        yield Row(name, lambda _dropped, columns=columns: columns)  # type: ignore[misc]


def _open_dataset(corpus: CorpusSection, advance: Advance, share: Share, *, as_chat: bool) -> Reading:
    found = open_share(
        corpus,
        advance,
        task=share.task,
        num_tasks=share.num_tasks,
        revision=share.revision,
        as_chat=as_chat,
    )
    return Reading(found.rows, found.num_rows, "rows", found.layout)
