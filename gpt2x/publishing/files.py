"""Exports appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2x.errors import UserError


@contextmanager
def whole_or_nothing(output_dir: Path) -> Iterator[Path]:
    """Yields an empty directory beside `output_dir`; when the block has succeeded, its files move there.

    A new directory appears by one rename. Into one that exists (another precision of the same model) the files are
    moved one by one, each replacing its predecessor at once, the last in name order first: `onnx/` before the
    `config.json` that names it. What a killed export leaves is a directory named `….partial`, which the next one
    replaces.

    Raises:
        UserError: where `output_dir` is a file.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output ({output_dir}) must be a directory, but is a file; give another by --output.")
    partial = output_dir.with_name(f"{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _move(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, output_dir: Path) -> None:
    if not output_dir.exists():
        partial.rename(output_dir)
        return
    for file in sorted((path for path in partial.rglob("*") if path.is_file()), reverse=True):
        target = output_dir / file.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)


def size_bytes(directory: Path, pattern: str = "**/*") -> int:
    """Bytes of the files of a directory, or of those that match a pattern."""
    return sum(path.stat().st_size for path in directory.glob(pattern) if path.is_file())
