"""What befalls the processes of a preparation is said in one line. (Imports little: every process here imports it.)"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gpt2x.errors import UserError
from gpt2x.preparation.workers import run_parts


def note_process(recipe: Path, part: int, report) -> None:
    report(1, part)
    (recipe / str(part)).write_text(f"{os.getpid()} {os.environ['RAYON_NUM_THREADS']}")


def note_mask(recipe: Path, part: int, report) -> None:
    (recipe / str(part)).write_text(str(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])))


def die(recipe: Path, part: int, report) -> None:
    os.kill(os.getpid(), signal.SIGKILL) if part == 1 else time.sleep(60)


def exit_early(recipe: Path, part: int, report) -> None:
    sys.exit(3)


def complain(recipe: Path, part: int, report) -> None:
    raise UserError("the value broke the rule; mend it.")


def workers() -> list[psutil.Process]:
    children = (child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_every_part_is_worked_on_once_by_processes_that_share_the_cores(tmp_path):
    told = []
    run_parts(note_process, tmp_path, range(5), num_workers=2, report=lambda *amount: told.append(amount))
    notes = [(tmp_path / str(part)).read_text().split() for part in range(5)]
    assert sorted(told) == [(1, part) for part in range(5)]
    assert len({process for process, _ in notes}) == 2
    assert {threads for _, threads in notes} == {str(max(len(os.sched_getaffinity(0)) // 2, 1))}
    assert not workers()


def test_the_first_workers_of_a_process_do_not_hear_ctrl_c(tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:];"
        "from gpt2x.preparation.workers import run_parts; from test_preparation_workers import note_mask;"
        "run_parts(note_mask, Path(sys.argv[1]), range(2), num_workers=2, report=print)"
    )
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    subprocess.run([sys.executable, "-c", code, str(tmp_path), *paths], check=True)
    assert [(tmp_path / str(part)).read_text() for part in range(2)] == ["True", "True"]


def test_a_dead_worker_is_named_with_its_task_and_the_others_end(tmp_path):
    started = time.monotonic()
    expected = (
        r"the worker of task 1 \(process \d+\) was killed by SIGKILL; perhaps memory ran out: .*; run the command"
    )
    with pytest.raises(UserError, match=expected):
        run_parts(die, tmp_path, range(2), num_workers=2, report=print)
    assert time.monotonic() - started < 30
    assert not workers()


def test_a_worker_that_leaves_is_named_with_its_exit_code(tmp_path):
    with pytest.raises(
        UserError, match=r"the worker of task 0 \(process \d+\) ended with exit code 3; run the command"
    ):
        run_parts(exit_early, tmp_path, range(1), num_workers=1, report=print)


def test_a_users_mistake_in_a_worker_is_the_same_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^the value broke the rule; mend it.$"):
        run_parts(complain, tmp_path, range(2), num_workers=2, report=print)
