"""Where documents come from, which of them a task reads, and on which side of the split each one falls."""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gpt2x.config import CorpusSection
from gpt2x.corpus.cutting import CHARACTERS_PER_PIECE, as_whole, chunks_of, cut, pieces_of
from gpt2x.corpus.dataset_rows import FindLayout, open_share
from gpt2x.corpus.file_rows import columns_of, rows_of
from gpt2x.corpus.layouts import Layout, Message, TextColumn, find_layout
from gpt2x.corpus.rows import Advance, Row, Share
from gpt2x.corpus.source_files import kind_of, source_files
from gpt2x.corpus.text_files import LongFile, unheard
from gpt2x.errors import UserError

WHOLE = Share()


class Piece(NamedTuple):
    """A document, or a part of a long one. The parts of a document follow each other."""

    name: str
    """Path of the file, with the line number where a file holds many documents."""
    text: str
    """Of a conversation all that is said, as JSON."""
    is_validation: bool
    """Whether the whole document is held out."""
    is_last: bool
    """Whether the document ends here."""
    messages: list[Message] | None = None
    """Of a conversation."""


class Reading(NamedTuple):
    """A share of a corpus that is about to be read."""

    corpus: CorpusSection
    rows: Iterator[Row | LongFile]
    size: int | None
    """How much there is to read, in the unit; None where nobody knows."""
    unit: str
    """Of the size: B or rows."""
    layout: Layout | TextColumn | None
    """How the rows hold documents; None where there is no row to tell it."""


def is_validation(text: str, corpus: CorpusSection) -> bool:
    """Whether a document is held out: a function of its text and the split's seed, so duplicates stay together."""
    return _is_held_out(chunks_of(text), corpus)


def _is_held_out(chunks: Iterable[str], corpus: CorpusSection) -> bool:
    digest = hashlib.blake2b(digest_size=8, person=b"gpt2x split", key=str(corpus.split_seed).encode())
    for chunk in chunks:
        digest.update(chunk.encode())
    return int.from_bytes(digest.digest(), "little") < corpus.validation_fraction * 2**64


def read_pieces(reading: Reading, *, dropped: Counter[str], cuts: bool) -> Iterator[Piece]:
    """The documents of a share in an order that the file system has no say in: conversations, and plain texts among
    them, whole; of other corpora long ones in pieces.

    Texts are what the bytes say, line ends too, without a byte order mark. Documents without anything but whitespace
    and documents that are not UTF-8 are left out.

    Args:
        reading: what to read.
        dropped: counts what was left out, by reason.
        cuts: whether long documents may be cut.

    Raises:
        UserError: for a file that is not what its name says, a broken .jsonl line, a missing column, and a row that
            does not hold what the corpus' layout says.
    """
    for row in reading.rows:
        if isinstance(row, LongFile):
            yield from _long_file(row, reading.corpus, dropped=dropped, cuts=cuts)
            continue
        assert reading.layout is not None, "where there is a row, there is a layout"
        try:
            columns = row.columns()
        except UnicodeDecodeError:
            dropped["not UTF-8"] += 1
            continue
        text, left_out, messages = reading.layout.document(columns, row.name)
        if left_out is not None:
            dropped[left_out] += 1
        elif isinstance(reading.layout, Layout):
            yield Piece(row.name, text, is_validation(text, reading.corpus), True, messages)
        else:
            parts = pieces_of(text, cuts=cuts, name=row.name)
            yield from _as_pieces(row.name, parts, is_validation(text, reading.corpus))


def _as_pieces(name: str, parts: Iterator[str], held_out: bool) -> Iterator[Piece]:
    part = next(parts)
    for following in parts:
        yield Piece(name, part, held_out, False)
        part = following
    yield Piece(name, part, held_out, True)


def _long_file(row: LongFile, corpus: CorpusSection, *, dropped: Counter[str], cuts: bool) -> Iterator[Piece]:
    """Reads the document twice, since the side it falls on is known at its end."""
    try:
        is_empty = all(text.isspace() for text in _chunks(row, unheard))
        held_out = _is_held_out(_chunks(row, unheard), corpus)
    except UnicodeDecodeError:
        dropped["not UTF-8"] += 1
        return
    if is_empty:
        dropped["empty"] += 1
        return
    chunks = _chunks(row, row.advance)
    yield from _as_pieces(row.name, cut(chunks) if cuts else iter((as_whole(chunks, row.name),)), held_out)


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
    every = list((source_files(corpus) if files is None else files).values())
    if corpus.kind == "dataset":
        found = open_share(corpus, advance, share, find_layout=_find_layout(corpus, as_chat))
        return Reading(corpus, _told_at_the_end(found.rows, every, read), found.size, "rows", found.layout)
    layout = _layout_of(every, corpus) if as_chat else TextColumn(column=corpus.text_column)
    own = _dealt_out(every, share)
    rows = _rows(own, corpus, advance, layout, read)
    if own is every:  # too few to be dealt out
        rows = islice(rows, share.task, None, share.num_tasks)
    return Reading(corpus, rows, _size_of(own), "B", layout)


def _find_layout(corpus: CorpusSection, as_chat: bool) -> FindLayout:
    if not as_chat:
        return lambda _found, _name: TextColumn(column=corpus.text_column)
    return lambda found, name: find_layout(found, name) if found else None


def _told_at_the_end(
    rows: Iterator[Row | LongFile], files: Sequence[Path], read: Callable[[Path], None]
) -> Iterator[Row | LongFile]:
    yield from rows
    for file in files:
        read(file)


def _layout_of(files: Sequence[Path], corpus: CorpusSection) -> Layout | None:
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
        share = Share(task=tasks[0], num_tasks=num_tasks)
        size = open_share(corpus, unheard, share, find_layout=_find_layout(corpus, as_chat)).size
        return size and size * len(tasks), "rows"
    shares = [Share(task=task, num_tasks=num_tasks) for task in tasks]
    return sum(_size_of(_dealt_out(list(files.values()), share)) for share in shares), "B"


def _dealt_out(files: list[Path], share: Share) -> list[Path]:
    """The files that a task reads: all where there are too few."""
    return files[share.task :: share.num_tasks] if len(files) >= share.num_tasks else files


def _size_of(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _rows(
    files: Sequence[Path],
    corpus: CorpusSection,
    advance: Advance,
    layout: Layout | TextColumn | None,
    read: Callable[[Path], None],
) -> Iterator[Row | LongFile]:
    for file in files:
        if layout is not None:
            yield from rows_of(file, corpus, advance, layout)
        read(file)
