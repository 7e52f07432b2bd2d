"""Opened files of text: decompressed, without a byte order mark, in UTF-8, and in rows that fit into memory; and the
documents of .txt files, which may have any length."""

import codecs
import gzip
import io
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow

from gpt2x.config import CorpusSection
from gpt2x.corpus.rows import Advance, Row
from gpt2x.corpus.source_files import TEXTS, kind_of
from gpt2x.errors import UserError

# A row is held in memory as a whole, and what is parsed of it besides: up to 13 bytes for each of its own, since one
# emoji makes Python take four for every letter, and its reader of CSV always does. A .txt file, or what lies between
# separators in one, may have any length.
MAX_ROW_BYTES = 2**25
# A document of more bytes in a .txt file is read in pieces.
LONG_FILE_BYTES = 8_000_000
WIDE_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


class OpenedFile:
    """The decompressed bytes of a file, and how far in the file itself they have come from."""

    def __init__(self, file: Path) -> None:
        suffix = file.suffix.lower()
        self.raw: Any = pyarrow.OSFile(str(file)) if suffix == ".zst" else file.open("rb")
        self.stream: Any = self.raw
        if suffix == ".zst":
            self.stream = io.BufferedReader(pyarrow.CompressedInputStream(self.raw, "zstd"), 2**16)
        elif suffix == ".gz":
            self.stream = io.BufferedReader(gzip.GzipFile(fileobj=self.raw), 2**16)
        self.file, self.told = file, 0

    def __enter__(self) -> "OpenedFile":
        """Raises UserError for a file of text in UTF-16."""
        try:
            with complaining(self.file):
                self._pass_over_mark()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _pass_over_mark(self) -> None:
        head = self.stream.peek(4)
        if head.startswith(codecs.BOM_UTF8):
            self.stream.read(len(codecs.BOM_UTF8))
        wide = next((name for mark, name in WIDE_MARKS.items() if head.startswith(mark)), None)
        if wide is not None and kind_of(self.file) in TEXTS:
            raise UserError(f"'{self.file}' is in {wide}; save it as UTF-8: iconv -f {wide} -t UTF-8 FILE > NEW.")

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.raw.close()

    def read_line(self, number: int) -> bytes:
        """The next line, which has this number; nothing at the end.

        Raises:
            UserError: for one that is too long to be held.
        """
        line: bytes = self.stream.readline(MAX_ROW_BYTES + 1)
        if len(line) > MAX_ROW_BYTES:
            raise too_long(f"{self.file}:{number}")
        return line

    def tell(self, advance: Advance) -> None:
        """Tells what has been read of the file since the last time."""
        position = self.raw.tell()
        advance(position - self.told)
        self.told = position


class Spooled:
    """A document that was found inside a file and is too long to be held."""

    def __init__(self) -> None:
        self.stream: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (gone with its last reader)

    def __enter__(self) -> "Spooled":
        self.stream.seek(0)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self, advance: Advance) -> None:
        """What it was found in is told elsewhere."""


@contextmanager
def complaining(file: Path) -> Iterator[None]:
    """What a damaged file raises becomes a line that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"'{file}' cannot be read ({reason}); repair it or leave it out.") from None


def too_long(name: str) -> UserError:
    """The complaint of a row that is too long to be held."""
    return UserError(
        f"{name} has more than {MAX_ROW_BYTES:,} bytes; cut it into several, or give the text as a .txt file, which "
        f"may have any length."
    )


def unheard(_: int) -> None:
    """Is told how much was read, and makes nothing of it."""


class LongFile(NamedTuple):
    """A document of a .txt file that is too long to be held."""

    name: str
    open: Callable[[], OpenedFile | Spooled]
    """Opens it at its beginning, as often as that is needed until the next row is asked for."""
    advance: Advance


def whole_file(file: Path, corpus: CorpusSection, advance: Advance) -> Iterator[Row | LongFile]:
    """A file that is one document."""
    with OpenedFile(file) as opened:
        content = opened.stream.read(LONG_FILE_BYTES + 1)
    if len(content) > LONG_FILE_BYTES:
        yield LongFile(str(file), lambda: OpenedFile(file), advance)
    else:
        yield _text_row(str(file), content, corpus)
        advance(file.stat().st_size)


def _text_row(name: str, content: bytes, corpus: CorpusSection) -> Row:
    return Row(name, lambda: {corpus.text_column: content.decode()})


def separated_documents(
    file: Path, separator: bytes, corpus: CorpusSection, advance: Advance
) -> Iterator[Row | LongFile]:
    """The documents of a file, with something between them."""
    document = _Document(corpus)
    number, buffer = 0, bytearray()
    with OpenedFile(file) as opened:
        while chunk := opened.stream.read(2**20):
            buffer += chunk
            start = 0
            while (end := buffer.find(separator, start)) >= 0:
                number += 1
                document.add(bytes(buffer[start:end]))
                yield from document.ended(f"{file}:{number}")
                start = end + len(separator)
            # A separator may lie across the chunks' border.
            kept = max(len(buffer) - len(separator) + 1, start)
            document.add(bytes(buffer[start:kept]))
            del buffer[:kept]
            opened.tell(advance)
    document.add(bytes(buffer))
    if document.size:
        yield from document.ended(f"{file}:{number + 1}")


class _Document:
    """A document that is being read; on the disk where it gets too long."""

    def __init__(self, corpus: CorpusSection) -> None:
        self.corpus, self.size = corpus, 0
        self._parts: list[bytes] = []
        self._spooled: Spooled | None = None

    def add(self, part: bytes) -> None:
        """Goes on with the document."""
        self._parts.append(part)
        self.size += len(part)
        if self.size > LONG_FILE_BYTES:
            self._spooled = self._spooled or Spooled()
            self._spooled.stream.writelines(self._parts)
            self._parts.clear()

    def ended(self, name: str) -> Iterator[Row | LongFile]:
        """What was read, as one row; begins the next document."""
        parts, spooled = self._parts, self._spooled
        self._parts, self._spooled, self.size = [], None, 0
        if spooled is None:
            yield _text_row(name, b"".join(parts), self.corpus)
        else:
            with closing(spooled.stream):
                yield LongFile(name, lambda: spooled, unheard)
