"""Asked once a process remembers what it has to save, or leaves at once; asked twice it leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2x.training.signals import StopRequest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_remembered_with_the_exit_code_of_a_shell(capfd, number, code):
    with StopRequest() as stop:
        stop.hold()
        assert (stop.is_asked(), stop.exit_code) == (False, 0)
        signal.raise_signal(number)
        assert (stop.is_asked(), stop.signal_number, stop.exit_code) == (True, number, code)
    line = f"{number.name}: saving after this step; once more to leave at once."
    assert capfd.readouterr().err.strip() == line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_with_nothing_to_save_a_signal_leaves_at_once_in_one_line(capfd, number, code):
    with StopRequest() as stop:
        stop.hold()
        stop.let_go()
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(number)
    assert left.value.code == code
    assert capfd.readouterr().err.strip() == f"{number.name}: nothing to save, leaving."


SECOND = """
import signal, sys, threading, time
from gpt2x.training.signals import StopRequest
threading.Thread(target=time.sleep, args=(60,)).start()
with StopRequest() as stop:
    stop.hold()
    signal.raise_signal(signal.SIGINT)
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        print("cleaned up")
"""


def test_a_second_signal_leaves_at_once_whatever_else_is_running():
    left = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, cwd=ROOT, timeout=20)
    assert (left.returncode, left.stdout) == (143, "")
    assert left.stderr.strip() == "SIGINT: saving after this step; once more to leave at once."


def test_sigusr1_asks_to_save_once_and_to_go_on(capfd):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert [stop.take_save_request(), stop.take_save_request(), stop.is_asked()] == [True, False, False]
    assert capfd.readouterr().err.strip() == "SIGUSR1: saving after this step, and going on."


ORPHAN = """
import os, sys, time
from gpt2x.training.signals import StopRequest
if os.fork():
    time.sleep(0.3)
    os._exit(0)
with StopRequest(watches_parent=sys.argv[1] == "watched") as stop:
    stop.hold()
    print(stop.is_asked(), flush=True)
    time.sleep(0.6)
    print(stop.is_asked(), stop.exit_code, flush=True)
"""


@pytest.mark.parametrize(("mode", "after"), [("watched", "True 143"), ("unwatched", "False 0")])
def test_the_death_of_a_launcher_counts_as_sigterm(mode, after):
    reading, writing = os.pipe()
    with open(reading) as output:
        subprocess.run([sys.executable, "-c", ORPHAN, mode], stdout=writing, stderr=subprocess.DEVNULL, cwd=ROOT)
        os.close(writing)
        assert output.read().splitlines() == ["False", after]


def test_the_handlers_of_before_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_sighup_stays_ignored_where_it_was_as_nohup_has_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_asked()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_asks_twice_and_the_run_is_saved_all_the_same(capfd):
    with StopRequest() as stop:
        stop.hold()
        for number in (signal.SIGHUP, signal.SIGHUP):
            signal.raise_signal(number)
        assert (stop.is_asked(), stop.exit_code) == (True, 129)
    assert capfd.readouterr().err.strip() == "SIGHUP: saving after this step; once more to leave at once."


# The main thread waits for a lock that it has itself, in the C library, where no handler of Python's is ever run.
DEAF = """
import ctypes, sys
from gpt2x.training import signals
signals.LEAVE_S = 0.3
mutex, libc = ctypes.create_string_buffer(256), ctypes.CDLL(None)
with signals.StopRequest() as stop:
    if sys.argv[1] == "held":
        stop.hold()
    libc.pthread_mutex_lock(mutex)
    print("deaf", flush=True)
    libc.pthread_mutex_lock(mutex)
"""
SAVING = "SIGTERM: saving after this step; once more to leave at once."


@pytest.mark.parametrize(("mode", "said"), [("free", "SIGTERM: nothing to save, leaving."), ("held", SAVING)])
def test_a_main_thread_that_waits_outside_of_python_is_ended_all_the_same(mode, said):
    with subprocess.Popen(
        [sys.executable, "-c", DEAF, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as deaf:
        assert deaf.stdout.readline() == "deaf\n"
        deaf.send_signal(signal.SIGTERM)
        assert [deaf.stderr.readline(), deaf.stderr.readline()] == ["\n", f"{said}\n"]
        if mode == "held":
            deaf.send_signal(signal.SIGTERM)
        assert deaf.wait(10) == 143


FORKING = """
import os, signal, time
from gpt2x.training.signals import StopRequest
with StopRequest() as stop:
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    time.sleep(0.2)
    print(status, stop.is_asked())
"""


def test_a_signal_to_a_forked_child_ends_it_and_is_none_to_its_parent():
    ended = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, cwd=ROOT, timeout=20)
    assert (ended.stdout, ended.stderr) == ("-15 False\n", "")


# The kernel gives the signal to the thread that listens, and the main thread sleeps on.
ASLEEP = """
import signal, time
from gpt2x.training.signals import StopRequest
with StopRequest():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        print("asleep", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up")
"""


def test_a_main_thread_that_sleeps_is_woken_to_clean_up():
    with subprocess.Popen(
        [sys.executable, "-c", ASLEEP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as asleep:
        assert asleep.stdout.readline() == "asleep\n"
        asleep.send_signal(signal.SIGTERM)
        said = asleep.communicate(timeout=9)
    assert (asleep.returncode, *said) == (143, "cleaned up\n", "\nSIGTERM: nothing to save, leaving.\n")


def test_who_leaves_cleans_up_first():
    code = (
        "import signal, threading, time\nfrom gpt2x.training.signals import StopRequest\n"
        "with StopRequest():\n    try:\n        threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "        signal.raise_signal(signal.SIGTERM)\n    finally:\n        print('cleaned up')\n"
    )
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=20)
    assert (left.returncode, left.stdout) == (143, "cleaned up\n")
