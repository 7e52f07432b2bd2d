"""Work side by side on the cores gives what the same work one after the other gives."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from gpt2x.evaluation.side_by_side import side_by_side


@pytest.fixture(autouse=True)
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_pieces():
    def slow_at_first(number):
        time.sleep(0.05 if number == 0 else 0)
        return number, torch.get_num_threads()

    assert list(side_by_side(slow_at_first, range(7))) == [(number, 1) for number in range(7)]
    assert torch.get_num_threads() == 2


def test_two_pieces_are_computed_at_once():
    meeting = threading.Barrier(2, timeout=10)
    assert len(list(side_by_side(lambda _: meeting.wait(), range(4)))) == 4


def test_pieces_are_taken_as_they_are_needed():
    taken = []

    def pieces():
        for number in range(100):
            taken.append(number)
            yield number

    results = side_by_side(lambda number: number, pieces())
    assert next(results) == 0
    assert len(taken) == 3
    results.close()
    assert len(taken) == 3
    assert torch.get_num_threads() == 2


def test_what_fails_in_a_thread_fails_here():
    def fails(number):
        if number == 2:
            raise ValueError("piece 2")
        return number

    with pytest.raises(ValueError, match="piece 2"):
        list(side_by_side(fails, range(9)))
    assert torch.get_num_threads() == 2


def test_threads_that_come_later_have_all_cores():
    list(side_by_side(lambda number: number, range(3)))
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2]


PASSES = """
import resource, torch
from gpt2x.evaluation.side_by_side import keep_freed_memory
keep_freed_memory()
def work():
    parts = [torch.ones(3 * 2**20) for _ in range(3)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.trial
@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux gives memory back at once")
def test_memory_that_is_kept_is_not_asked_for_again():
    command = [sys.executable, "-c", PASSES]
    page_faults = int(subprocess.run(command, capture_output=True, check=True).stdout)
    # of twenty passes; without keep_freed_memory most ask for all that they need
    assert page_faults < 3 * (3 * 3 * 2**20 * 4 / 4096)
