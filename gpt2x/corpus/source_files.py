"""Which files a corpus is made of."""

import os
import sys
import sysconfig
from pathlib import Path

from huggingface_hub import HfApi

from gpt2x.config import CorpusSection
from gpt2x.corpus.paths import matches_of, matching_files, walk
from gpt2x.corpus.rows import BUILDERS

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


def dataset_revision(corpus: CorpusSection) -> str | None:
    """The newest commit of a dataset of the Hub; None for any other corpus, and where nobody answers."""
    if corpus.kind != "dataset" or corpus.dataset in BUILDERS or Path(str(corpus.dataset)).exists():
        return None
    # Of the HTTP client that huggingface_hub has loaded; which one depends on its version.
    clients = [sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules]
    unreachable: tuple[type[BaseException], ...] = (OSError, *clients)
    try:
        return HfApi().dataset_info(str(corpus.dataset), timeout=10).sha
    except unreachable:  # whoever reads the dataset will say what is wrong
        return None


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
