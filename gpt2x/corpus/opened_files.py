"""Opened files of text: decompressed, without a byte order mark, in UTF-8, and in rows that fit into memory."""

import codecs
import gzip
import io
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow

from gpt2x.corpus.rows import Advance
from gpt2x.corpus.source_files import TEXTS, kind_of
from gpt2x.errors import UserError

# A row is held in memory as a whole, and what is parsed of it besides: up to 13 bytes for each of its own, since one
# emoji makes Python take four for every letter, and its reader of CSV always does. A .txt file, or what lies between
# separators in one, may have any length.
MAX_ROW_BYTES = 2**25
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
