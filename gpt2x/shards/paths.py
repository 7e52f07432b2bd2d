"""Which files the paths of a corpus mean: each file once, in an order that the file system has no say in."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpt2x.errors import UserError

COMPRESSIONS = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
TEXTS = (".txt", ".jsonl", ".json", ".csv", ".tsv")
READABLE = (*TEXTS, *TABLES, *(kind + compression for kind in TEXTS for compression in COMPRESSIONS))


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
        for file in _files_in(match) if match.is_dir() else [_readable(match)]:
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
    """The files of a folder and of its folders, sorted; not what is hidden. Links are followed, but no folder is
    entered twice; where links lead to a folder that is found without them, it goes by its own name."""
    seen = {os.path.realpath(folder)}
    found, linked = [], [folder]
    while linked:
        waiting, linked = linked, []
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if entry.name.startswith("."):
                        continue
                    if not entry.is_dir():
                        found += [path] if entry.is_file() else []
                    elif entry.is_symlink():
                        linked.append(path)
                    elif (place := os.path.realpath(path)) not in seen:
                        seen.add(place)
                        waiting.append(path)
        linked = list(_unseen(linked, seen))
    yield from sorted(found)


def _unseen(links: Iterable[Path], seen: set[str]) -> Iterator[Path]:
    for link in sorted(links):
        place = os.path.realpath(link)
        if place not in seen:
            seen.add(place)
            yield link


def _matches(patterns: list[str]) -> Iterator[Path]:
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"corpus.paths: {pattern!r} matches no file; correct the path, or quote the pattern.")
        yield from map(Path, matches)


def _files_in(folder: Path) -> list[Path]:
    files = [file for file in walk(folder) if is_readable(file)]
    if not files:
        raise UserError(f"corpus.paths: the folder '{folder}' holds no file of {', '.join(READABLE)}; correct it.")
    return files


def _readable(file: Path) -> Path:
    if not is_readable(file):
        raise UserError(
            f"corpus.paths: '{file}' is of an unknown kind; rename it to one of {', '.join(READABLE)}, or omit it."
        )
    return file
