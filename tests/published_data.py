"""Published data that tests are compared with where GPT2X_TEST_DATA names a folder of it.

Its folders: gpt2-tokenizer, tinyshakespeare and hellaswag. Read by tests alone; nothing is fetched.
"""

import os
from pathlib import Path

import pytest

FOLDER = os.environ.get("GPT2X_TEST_DATA")


def published(name: str) -> Path | None:
    """A file or folder of it, or None where it is not there."""
    path = None if FOLDER is None else Path(FOLDER, name)
    return path if path is not None and path.exists() else None


def needed(name: str) -> Path:
    """A file or folder of it; the test is skipped where it is not there."""
    path = published(name)
    if path is None:
        pytest.skip(f"GPT2X_TEST_DATA names no folder with {name}")
    return path
