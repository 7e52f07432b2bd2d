"""Which files a corpus is made of: each once, in an order that the file system has no say in."""

import fnmatch
import glob
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gpt2x.config import CorpusSection
from gpt2x.errors import UserError

# Readers of the datasets library. Without files these read the current directory, whatever is there.
BUILDERS = ("json", "parquet", "arrow", "text", "csv")
COMPRESSIONS = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
TEXTS = (".txt", ".jsonl", ".json", ".csv", ".tsv")
KINDS = f"{', '.join(TEXTS)} (also .gz, .zst), {', '.join(TABLES)}"
READABLE = (*TEXTS, *TABLES, *(kind + compression for kind in TEXTS for compression in COMPRESSIONS))
# Tests are long tables of cases and would be a third of the corpus; the packages are not the library's.
NOT_LIBRARY_SOURCES = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def source_files(corpus: CorpusSection) -> dict[str, Path]:
    """The files of a corpus in order, by the names under which they are recorded: the same wherever Python is
    installed. Of a dataset those that are named by a path of this machine; none of the Hub's.

    Raises:
        UserError: for a path that matches no file, and an unknown kind of file.
    """
    if corpus.kind == "files":
        return {_name(file): file for file in matching_files(corpus.paths)}
    if corpus.kind == "dataset":
        return {_name(file): file for file in _local_files(corpus)}
    if corpus.kind in ("python_stdlib", "python_docstrings"):
        roots, left_out = [Path(sysconfig.get_path("stdlib"))], NOT_LIBRARY_SOURCES
    else:
        roots = sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")})
        left_out = frozenset({"__pycache__"})
    base = os.path.commonpath(roots)
    files = [file for root in roots for file in _python_files(root, left_out)]
    return {file.relative_to(base).as_posix(): file for file in files}


def _name(file: Path) -> str:
    """The path as JSON can hold it: names of files need not be UTF-8."""
    return os.fsencode(file).decode(errors="backslashreplace")


def _local_files(corpus: CorpusSection) -> list[Path]:
    """What a dataset reads of this machine, as far as its name and data_files tell."""
    directory = Path(str(corpus.dataset))
    if corpus.dataset in BUILDERS:
        found = {Path(name) for pattern in corpus.data_files for name in matches_of(pattern)}
    else:
        found = set(walk(directory)) if directory.is_dir() else set()
    return sorted(file for file in found if file.is_file())


def _python_files(root: Path, left_out: frozenset[str]) -> list[Path]:
    found = []
    for directory, subdirectories, names in os.walk(root):
        # In place, so that site-packages is not even walked through.
        subdirectories[:] = [name for name in subdirectories if name not in left_out]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def kind_of(file: Path) -> str:
    """The suffix that says what a file holds, in small letters, whether it is compressed or not."""
    return Path(file.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def is_readable(file: Path) -> bool:
    """Whether its name says that it can be read."""
    return file.name.lower().endswith(READABLE)


def matching_files(patterns: list[str]) -> list[Path]:
    """The files of all patterns, each once: patterns in the given order, the matches of one pattern sorted.

    A path that exists is that path, whatever letters it is made of. A folder stands for what can be read in it and in
    its folders. A file with several names, by links, has the first.

    Raises:
        UserError: for a pattern that matches nothing, a folder without text and an unknown kind of file.
    """
    files: dict[str, Path] = {}
    for match in _matches(patterns):
        found = [file for file in (walk(match) if match.is_dir() else [match]) if is_readable(file)]
        if not found and match.is_dir():
            raise UserError(f"corpus.paths: the folder '{match}' holds no file of {KINDS}; correct the path.")
        if not found:
            raise UserError(
                f"corpus.paths: '{match}' is of an unknown kind; save it as one of {KINDS}, or leave it out."
            )
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def passed_over(patterns: list[str]) -> str | None:
    """What lies in the folders among the patterns and is not read, for a message of one line; None for nothing."""
    folders = [match for match in _matches(patterns) if match.is_dir()]
    others = {file for folder in folders for file in walk(folder) if not is_readable(file)}
    counts = Counter(file.suffix.lower() or "without ending" for file in others)
    if not counts:
        return None
    kinds = [f"{count:,} {kind}" for kind, count in counts.most_common()]
    shown = ", ".join(kinds[:8]) + (f" and {len(kinds) - 8} kinds more" if len(kinds) > 8 else "")
    return f"corpus.paths: files of other kinds are passed over: {shown}"


def walk(folder: Path) -> Iterator[Path]:
    """The files of a folder and of its folders, sorted; not what is hidden."""
    yield from sorted(path for path, is_folder in _below(folder) if not is_folder)


def _below(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Files and folders, and which of them are folders. Links are followed, but no folder is entered twice; where
    links lead to a folder that is found without them, it goes by its own name."""
    seen, linked = {os.path.realpath(folder)}, [folder]
    while linked:
        waiting, linked = linked, []
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
            for entry in visible:
                if entry.is_file():
                    yield Path(entry.path), False
                elif entry.is_dir() and entry.is_symlink():
                    linked.append(Path(entry.path))
                elif entry.is_dir() and (place := os.path.realpath(entry.path)) not in seen:
                    seen.add(place)
                    waiting.append(Path(entry.path))
                    yield waiting[-1], True
        places = {os.path.realpath(link): link for link in sorted(linked, reverse=True)}
        linked = [link for place, link in places.items() if place not in seen]
        seen |= set(places)
        yield from ((link, True) for link in linked)


def _matches(patterns: list[str]) -> Iterator[Path]:
    for pattern in patterns:
        matches = matches_of(pattern)
        if not matches:
            raise UserError(f"corpus.paths: {pattern!r} matches no file; correct the path, or quote the pattern.")
        yield from map(Path, matches)


def matches_of(pattern: str) -> list[str]:
    """What a pattern matches, sorted. A path that exists is that path, whatever letters it is made of."""
    if os.path.lexists(pattern):
        return [pattern]
    if "**" in Path(pattern).parts:
        return sorted(map(str, _deep_matches(Path(pattern))))
    return sorted(glob.glob(pattern))


def _deep_matches(pattern: Path) -> Iterator[Path]:
    """As glob has them, which goes round and round where a folder links to one above it."""
    place = pattern.parts.index("**")
    for root in map(Path, glob.glob(str(Path(*pattern.parts[:place])))):
        if root.is_dir():
            found = (path for path, _ in _below(root))
            yield from (path for path in found if _fits(path.relative_to(root).parts, pattern.parts[place:]))


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
