"""Runs as real processes, for the trials that kill, stop or starve them."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "training"))

from forked_runs import ForkedRuns


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The process from which a module's runs are forked."""
    forked = ForkedRuns(tmp_path_factory.mktemp("output"))
    yield forked
    forked.close()
