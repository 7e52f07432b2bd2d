"""Standard output and error that break, fill up, are closed or know few characters end no script."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpt2x.terminal import StandardStream

ROOT = Path(__file__).parents[1]
# What a script of hours does, in short: it prints, works on, and what it has worked is there in the end.
WORK = """
import sys
from pathlib import Path
from gpt2x.terminal import command

with command():
    for step in range(20):
        print("output", step)
        print("error", step, file=sys.stderr)
    Path("work").write_text("done")
"""
PRODUCT = """
from gpt2x.terminal import command

with command(is_product=True):
    for number in range(100_000):
        print("text", number)
"""


@pytest.fixture
def script(tmp_path):
    """Runs Python code in tmp_path: (exit code, output, errors); `where` goes behind it in a shell's command line."""

    def run(code, where="", **environment):
        (tmp_path / "script.py").write_text(code)
        ran = subprocess.run(
            ["bash", "-c", f'"{sys.executable}" script.py {where}'],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            timeout=60,
        )
        return ran.returncode, ran.stdout.decode(), ran.stderr.decode()

    return run


def lines(name):
    return [f"{name} {step}" for step in range(20)]


LOST = "{} cannot be written to ({}); going on without it."
PLACES = {
    "a full disk": ("> /dev/full", "stdout", [LOST.format("stdout", "No space left on device")]),
    "a full disk for errors": ("2> /dev/full", "stderr", [LOST.format("stderr", "No space left on device")]),
    "closed": (">&-", "stdout", []),
    "closed for errors": ("2>&-", "stderr", []),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_stream_that_cannot_be_written_to_ends_nothing_and_is_told_once_on_the_other(script, tmp_path, place):
    where, lost, told = PLACES[place]
    code, output, errors = script(WORK, where)
    assert (code, (tmp_path / "work").read_text()) == (0, "done")
    heard = [line for line in (errors if lost == "stdout" else output).splitlines() if line]
    assert sorted(heard) == sorted([*told, *lines("error" if lost == "stdout" else "output")])


def test_a_pipe_that_nobody_reads_any_more_is_replaced_also_for_other_processes(tmp_path):
    code = WORK + "\nimport subprocess\nprint(subprocess.run(['echo', 'heard']).returncode, file=sys.stderr)"
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        [sys.executable, "-c", code],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    os.close(writing)
    assert ran.returncode == 0
    told, *kept = ran.stderr.replace("\n\n", "\n").strip().splitlines()
    assert told == LOST.format("stdout", "Broken pipe")
    assert kept == [*lines("error"), "0"]


def test_a_terminal_that_is_closed_ends_nothing(tmp_path):
    master, terminal = pty.openpty()
    ran = subprocess.Popen(
        [sys.executable, "-c", "import time\n" + WORK.replace("print(", "time.sleep(0.02); print(")],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    os.close(terminal)
    os.read(master, 1)
    os.close(master)
    assert ran.wait(timeout=60) == 0
    assert (tmp_path / "work").read_text() == "done"


def test_what_is_printed_after_a_disk_has_room_again_is_there(tmp_path, monkeypatch):
    with (tmp_path / "log").open("wb") as log, (tmp_path / "other").open("wb") as other:
        stream, write = StandardStream(log.fileno(), "stdout", teller=other.fileno()), os.write

        def refuse(descriptor, data):
            if descriptor == log.fileno():
                raise OSError(28, "No space left on device")
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", refuse)
        assert [stream.write(b"lost\n") for _ in range(2)] == [5, 5]
        monkeypatch.setattr(os, "write", write)
        stream.write(b"kept\n")
    assert (tmp_path / "log").read_bytes() == b"kept\n"
    assert (tmp_path / "other").read_text() == f"\n{LOST.format('stdout', 'No space left on device')}\n"


def test_a_slow_reader_of_a_pipe_that_does_not_block_loses_nothing():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    text, heard = b"0123456789" * 20_000, []  # more than a pipe holds

    def read_slowly():
        time.sleep(0.05)
        while chunk := os.read(reading, 65536):
            heard.append(chunk)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    stream, written = StandardStream(writing, "stdout", teller=2), 0
    while written < len(text):
        written += stream.write(text[written:])
    os.close(writing)
    reader.join()
    os.close(reading)
    assert b"".join(heard) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8:strict"])
def test_characters_that_an_encoding_lacks_are_escaped(script, encoding):
    code = 'import sys\nfrom gpt2x.terminal import command\nwith command():\n    print("\\u27e6\\u00e9\\udcff")\n'
    ended, output, _ = script(code, "| iconv -f latin1", PYTHONIOENCODING=encoding)
    expected = {"ascii": "\\u27e6\\xe9\\udcff", "latin-1": "\\u27e6é\\udcff", "utf-8:strict": "â\x9f¦Ã©\\udcff"}
    assert (ended, output) == (0, expected[encoding] + "\n")


def test_what_is_typed_in_another_encoding_is_read(script):
    code = "from gpt2x.terminal import command\nwith command():\n    print(ascii(input()))\n"
    assert script(code, r"<<< $'caf\xe9'")[:2] == (0, "'caf\\ufffd'\n")
    assert script(code, "<&-")[0] == 1  # the null device is at its end, as any empty input


def test_no_file_gets_the_number_of_a_stream_that_was_closed(script, tmp_path):
    code = WORK.replace('Path("work")', 'log = open("log", "w"); assert log.fileno() > 2; Path("work")')
    assert script(code, ">&- 2>&- <&-")[0] == 0
    assert (tmp_path / "log").read_bytes() == b""


def test_a_script_that_works_for_what_it_prints_ends_where_nobody_reads_it_as_a_shells_tools_do(script):
    code, output, errors = script(PRODUCT, "| head -1; exit ${PIPESTATUS[0]}")
    assert (code, output, errors) == (128 + signal.SIGPIPE, "text 0\n", "")
    code, output, errors = script(PRODUCT, "> /dev/full")
    assert (code, output) == (1, "")
    assert errors == "error: stdout cannot be written to (No space left on device); give it another place.\n"


def test_ctrl_c_is_one_line(script):
    code = 'from gpt2x.terminal import command\nwith command(if_stopped="stopped; all is well"):\n'
    ended, output, errors = script(code + "    import os, signal\n    os.kill(os.getpid(), signal.SIGINT)\n")
    assert (ended, output, errors.split("\n")) == (130, "", ["", "stopped; all is well", ""])


COMPLAINTS = """
import os, sys
from gpt2x.errors import UserError
from gpt2x.terminal import command, one_voice

with command(os.environ):
    with one_voice(os.environ):
        print("help")
        if sys.argv[1] == "parse":
            print("script: error: a is no b", file=sys.stderr)
            sys.exit(2)
    raise UserError(sys.argv[1])
"""


def test_processes_of_a_launcher_say_the_same_once(script, tmp_path):
    """As torchrun starts them: each has a file for its errors, of which nothing is there yet but the directories."""

    def rank(number, argument):
        (tmp_path / "attempt_0" / str(number)).mkdir(parents=True, exist_ok=True)
        error_file = tmp_path / "attempt_0" / str(number) / "error.json"
        return script(COMPLAINTS, argument, LOCAL_RANK=str(number), TORCHELASTIC_ERROR_FILE=str(error_file))

    assert rank(1, "parse") == (2, "", "script: error: a is no b\n")
    assert rank(0, "parse") == (2, "help\n", "")
    assert rank(0, "disk") == (1, "help\n", "error: disk\n")
    assert rank(1, "disk") == (1, "", "")
    assert rank(1, "network") == (1, "", "error: network\n")
