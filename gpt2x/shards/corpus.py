"""Where documents come from, and on which side of the train/validation split each one falls."""

import glob
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpt2x.config import CorpusSection
from gpt2x.errors import UserError

# Tests are long tables of cases and would be a third of the corpus; the packages are not the library's.
NOT_LIBRARY_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    """One text and where it came from."""

    name: str
    """Path of the file, with the line number where a file holds many documents."""
    text: str


def documents(corpus: CorpusSection, *, dropped: Counter[str] | None = None) -> Iterator[Document]:
    """The documents of a corpus, in an order that the file system has no say in.

    Texts are what the bytes say: line ends and byte order marks stay. Documents without anything but whitespace and
    documents that are not UTF-8 are left out.

    Args:
        corpus: what to read.
        dropped: counts what was left out, by reason.

    Raises:
        UserError: for a path that matches no file, an unknown kind of file, a broken .jsonl line, a missing column.
    """
    dropped = Counter() if dropped is None else dropped
    for name, text in _stdlib_texts() if corpus.kind == "python_stdlib" else _file_texts(corpus):
        if text is None:
            dropped["not UTF-8"] += 1
        elif not text.strip():
            dropped["empty"] += 1
        else:
            yield Document(name, text)


def is_validation(text: str, corpus: CorpusSection) -> bool:
    """Whether a document is held out: a function of its text and the split's seed, so duplicates stay together."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"gpt2x split", key=str(corpus.split_seed).encode())
    return int.from_bytes(digest.digest(), "little") < corpus.validation_fraction * 2**64


def _stdlib_texts() -> Iterator[tuple[str, str | None]]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(file.relative_to(root).as_posix() for file in _python_files(root)):
        yield name, _decoded((root / name).read_bytes())


def _python_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        # In place, so that site-packages is not even walked through.
        subdirectories[:] = [name for name in subdirectories if name not in NOT_LIBRARY_SOURCES]
        yield from (Path(directory, name) for name in names if name.endswith(".py"))


def _file_texts(corpus: CorpusSection) -> Iterator[tuple[str, str | None]]:
    for file in _matching_files(corpus.paths):
        if file.suffix == ".jsonl":
            yield from _jsonl_texts(file, corpus.text_column)
        else:
            yield str(file), _decoded(file.read_bytes())


def _matching_files(patterns: list[str]) -> list[Path]:
    """The files of all patterns, each once: patterns in the given order, the matches of one pattern sorted."""
    files = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"corpus.paths: {pattern!r} matches no file; correct the path, or quote the pattern.")
        files += [_text_file(Path(match)) for match in matches]
    return list(dict.fromkeys(files))


def _text_file(file: Path) -> Path:
    if file.is_dir():
        raise UserError(f"corpus.paths: '{file}' is a directory; name its files, for example '{file}/*.txt'.")
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"corpus.paths: '{file}' must end in .txt or .jsonl; rename it or leave it out.")
    return file


# Not datasets' reader: its type inference turns a text that looks like a date into one.
def _jsonl_texts(file: Path, column: str) -> Iterator[tuple[str, str | None]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}:{number}", _jsonl_text(f"{file}:{number}", line, column)


def _jsonl_text(name: str, line: bytes, column: str) -> str | None:
    decoded = _decoded(line)
    if decoded is None:
        return None
    try:
        row = json.loads(decoded)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON ({error.msg}); a .jsonl file holds one object per line.") from None
    if not isinstance(row, dict) or column not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{name} has no field {column!r}, only: {found}; set corpus.text_column to one of them.")
    text = row[column]
    if not isinstance(text, str | None):
        raise UserError(f"{name}: field {column!r} must hold text, not {text!r}; set corpus.text_column to another.")
    # JSON can spell lone surrogates, which no UTF-8 and no tokenizer can.
    return _decoded((text or "").encode("utf-8", "surrogatepass"))


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None
