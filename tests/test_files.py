import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import NotRequired

import pytest
import torch
from safetensors.torch import save_file
from typing_extensions import TypedDict

from gpt2x import files
from gpt2x.files import (
    BusyError,
    DamagedError,
    UnwritableError,
    append_line,
    discard,
    locked,
    make_directory,
    read_bytes,
    read_json,
    read_records,
    read_yaml,
    remove_leftovers,
    retire,
    set_aside,
    whole_directory,
    write_file,
)


class Facts(TypedDict):
    size: int
    ratio: NotRequired[float]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- writing ---


def test_a_file_is_written_with_its_sha256(tmp_path):
    sha256 = write_file(tmp_path / "a", [b"one ", b"two"])
    assert (tmp_path / "a").read_bytes() == b"one two"
    assert sha256 == subprocess.check_output(["sha256sum", tmp_path / "a"], text=True).split()[0]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_file(tmp_path / "a", b"old")

    def pieces():
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(UnwritableError, match=r"a could not be written \(No space left on device\); mend that"):
        write_file(tmp_path / "a", pieces())
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_file_whose_directory_is_missing_is_refused_by_its_path(tmp_path):
    with pytest.raises(UnwritableError, match=r"gone/a could not be written \(No such file or directory\)"):
        write_file(tmp_path / "gone" / "a", b"")


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    sync, rename, replace = files.sync, Path.rename, Path.replace
    monkeypatch.setattr(files, "sync", lambda path: (order.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(os, "fsync", lambda descriptor, fsync=os.fsync: (order.append(("fsync",)), fsync(descriptor)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (order.append(("rename", to.name)), rename(path, to))[1])
    monkeypatch.setattr(Path, "replace", lambda path, to: (order.append(("rename", to.name)), replace(path, to))[1])
    write_file(tmp_path / "a", b"1")
    with whole_directory(tmp_path / "d") as directory:
        (directory / "in").mkdir()
        (directory / "in" / "b").write_bytes(b"2")
    steps = [step for step in order if step != ("fsync",)]
    assert order[:2] == [("fsync",), ("rename", "a")]
    assert [name for _, name in steps[2:]] == ["in", "b", directory.name, "d", tmp_path.name]


def test_a_directory_appears_whole_and_with_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        with whole_directory(tmp_path / "model") as directory:
            save_file({"x": torch.ones(2)}, directory / "model.safetensors")
            assert names(tmp_path) == [directory.name]
    finally:
        os.umask(before)
    assert names(tmp_path) == ["model"]
    assert stat.S_IMODE((tmp_path / "model" / "model.safetensors").stat().st_mode) == 0o664


def test_a_directory_that_fails_leaves_nothing_and_what_was_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("kept")

    def fail(directory):
        (directory / "half").write_text("")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "model", replaces=True) as directory:
        fail(directory)
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "mine").read_text() == "kept"


def test_somebody_elses_directory_does_not_give_way(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("kept")
    with (
        pytest.raises(UnwritableError, match=r"model could not be written \(Directory not empty\)"),
        whole_directory(tmp_path / "model"),
    ):
        pass
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["mine"]


def test_a_directory_gives_way_to_its_successor(tmp_path):
    for content in ("old", "new"):
        with whole_directory(tmp_path / "final", replaces=True) as directory:
            (directory / content).write_text("")
    assert names(tmp_path) == ["final"]
    assert names(tmp_path / "final") == ["new"]


def test_an_error_elsewhere_names_that_place_too(tmp_path):
    with (
        pytest.raises(UnwritableError, match=r"model could not .*\(No such file or directory: /nowhere/at all\)"),
        whole_directory(tmp_path / "model"),
    ):
        Path("/nowhere/at all").read_text()


def test_parents_are_made_durably(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", synced.append)
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert synced == [tmp_path / "a", tmp_path]


def test_files_join_a_directory_that_is_there_config_json_last(tmp_path, monkeypatch):
    for name in ("config.json", "mine", "onnx/old"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("old")
    moved, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: moved.append(target.name) or replace(self, target))
    with whole_directory(tmp_path / "out", joins=True) as made:
        for name in ("config.json", "onnx/new", "z"):
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_text("new")
    assert moved == ["new", "z", "config.json"]
    assert {path.name: path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        "config.json": "new",
        "mine": "old",
        "new": "new",
        "old": "old",
        "z": "new",
    }
    assert names(tmp_path) == ["out"]


# --- removing ---


def test_only_what_a_killed_writer_of_ours_left_is_removed(tmp_path):
    (tmp_path / "model.tmp-0123abcd").mkdir()
    (tmp_path / "file.tmp-0123abcd").write_text("")
    others = ["model.tmp-mine", "model.partial", "model.tmp", "model.tmp-0123ABCD"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "model.tmp-00000001").symlink_to(tmp_path / "model.partial")
    os.mkfifo(tmp_path / "model.tmp-00000002")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, "model.tmp-00000001", "model.tmp-00000002"])


def test_what_cannot_be_removed_is_told_once(tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "old").mkdir()
    monkeypatch.setattr(files.shutil, "rmtree", refuse)
    discard(tmp_path / "old")
    discard(tmp_path / "old")
    assert capsys.readouterr().err == f"{tmp_path}/old could not be removed (Permission denied); delete it yourself.\n"


def test_a_retired_directory_has_lost_its_name_before_its_content(tmp_path, monkeypatch):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "a").write_text("")
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: None)
    retire(tmp_path / "step")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("step.tmp-")
    assert names(left) == ["a"]


def test_a_directory_in_a_parent_that_may_not_be_written_to_stays_whole(tmp_path, monkeypatch, capsys):
    def refuse(path, target):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "a").write_text("")
    monkeypatch.setattr(Path, "rename", refuse)
    retire(tmp_path / "step")
    assert names(tmp_path / "step") == ["a"]
    assert "step could not be removed (Permission denied)" in capsys.readouterr().err


def test_what_is_set_aside_gets_the_next_name_that_is_free(tmp_path):
    for number in (1, 2):
        (tmp_path / "final").mkdir()
        assert set_aside(tmp_path / "final") == tmp_path / f"final.kept-{number}"
    assert names(tmp_path) == ["final.kept-1", "final.kept-2"]


def test_a_line_is_appended_to_a_regular_file_and_to_nothing_else(tmp_path):
    append_line(tmp_path / "a", b"1")
    append_line(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1\n2\n"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("fifo", "device"):
        with pytest.raises(UnwritableError, match=rf"{name} could not be written \((it is no regular|No such device)"):
            append_line(tmp_path / name, b"1")


# --- reading ---


def test_json_of_the_right_shape_is_read_with_keys_of_later_versions(tmp_path):
    (tmp_path / "a.json").write_text('{"size": 3, "ratio": 1, "later": [1]}')
    assert read_json(tmp_path / "a.json", Facts) == {"size": 3, "ratio": 1, "later": [1]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is no JSON"),
        ('{"size": 3', "is no JSON"),
        ('{"size": NaN}', "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"size": ' + "9" * 5_000 + "}", "is no"),
        ('{"size": "3"}', r"is not as gpt2x writes it \(size: "),
        ('{"size": true}', r"is not as gpt2x writes it \(size: "),
        ('{"size": 3.5}', r"is not as gpt2x writes it \(size: "),
        ("{}", r"is not as gpt2x writes it \(size: "),
        ("[3]", "is not as gpt2x writes it"),
        ("\udcff", "is no JSON"),
    ],
)
def test_other_json_is_damaged(tmp_path, content, reason):
    (tmp_path / "a.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DamagedError, match=reason):
        read_json(tmp_path / "a.json", Facts)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "is missing"),
        (lambda path: path.symlink_to("nowhere"), "is missing"),
        (lambda path: path.mkdir(), r"cannot be read \(Is a directory\)"),
        (os.mkfifo, "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
        (lambda path: path.write_bytes(b" " * 101), "has 101 bytes, more than 100"),
    ],
    ids=["missing", "dangling", "directory", "fifo", "device", "loop", "large"],
)
def test_what_is_no_small_regular_file_is_damaged(tmp_path, make, reason):
    make(tmp_path / "a")
    with pytest.raises(DamagedError, match=reason):
        read_bytes(tmp_path / "a", max_bytes=100)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- a",
        b"\x00\x01",
        b"a: [",
        b"!!python/object/apply:os.getcwd []",
        b"a: &x [1]\nb: *x",
        b"[" * 100_000,
        b"a: " + b"{b: " * 2_000 + b"1" + b"}" * 2_000,
    ],
    ids=["empty", "list", "binary", "cut", "tag", "alias", "deep", "deep-mapping"],
)
def test_other_yaml_is_damaged(tmp_path, content):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(DamagedError, match=r"a\.yaml is no"):
        read_yaml(tmp_path / "a.yaml")


def test_yaml_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: {b: [1, 2.5]}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": {"b": [1, 2.5]}}


def test_torn_records_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"size": 1}\n\n{"size": "2"}\n{"si\xff\n{"size": 4}\n{"size": 5')
    assert list(read_records(tmp_path / "a.jsonl", Facts)) == [{"size": 1}, {"size": 4}]
    assert list(read_records(tmp_path / "none.jsonl", Facts)) == []
    told = []
    assert len(list(read_records(tmp_path / "a.jsonl", Facts, tell=told.append))) == 2
    assert [reason.split(" ")[0][-2:] for reason in told] == [":3", ":4", ":6"]


# --- locks ---

HOLDER = """
import sys, time
from pathlib import Path
from gpt2x.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run.lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_of_a_living_process_is_respected_and_its_owner_named(tmp_path, holder):
    with (
        pytest.raises(BusyError, match=f"process {holder.pid} on {socket.gethostname()}"),
        locked(tmp_path / "run.lock"),
    ):
        pass


def test_a_lock_is_free_as_soon_as_its_owner_was_killed_and_leaves_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "run.lock"):
        assert names(tmp_path) == ["run.lease", "run.lock"]
    assert names(tmp_path) == []


def test_a_lock_whose_directory_was_moved_leaves_that_of_its_successor(tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run" / "run.lock"):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        successor = locked(tmp_path / "run" / "run.lock")
        successor.__enter__()
    assert names(tmp_path / "run") == ["run.lease", "run.lock"]
    successor.__exit__(None, None, None)


def test_who_waits_gets_the_lock_afterwards(tmp_path):
    order = []

    def second():
        with locked(tmp_path / "run.lock", waits=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path / "run.lock"):
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_who_waits_says_for_whom(tmp_path, holder, monkeypatch, capsys):
    monkeypatch.setattr(files, "SILENT_S", 0.5)
    threading.Timer(0.9, lambda: (holder.kill(), holder.wait())).start()
    with locked(tmp_path / "run.lock", waits=True):
        pass
    where = f"process {holder.pid} on {socket.gethostname()}, which has {tmp_path}/run.lock"
    assert capsys.readouterr().err == f"waiting for {where}\n"


def test_another_thread_may_give_a_lock_free(tmp_path):
    lock = locked(tmp_path / "run.lock")
    lock.__enter__()
    thread = threading.Thread(target=lock.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    with locked(tmp_path / "run.lock"):
        pass


def test_a_lease_of_another_machine_ends_with_its_heartbeat_which_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "LEASE_S", 1.0)
    with locked(tmp_path / "run.lock"):
        record = (tmp_path / "run.lease").read_text()
    foreign = record.replace(socket.gethostname(), "elsewhere")
    assert foreign != record
    (tmp_path / "run.lease").write_text(foreign)
    monkeypatch.setattr(files, "SILENT_S", 0.1)
    with locked(tmp_path / "run.lock"):
        assert socket.gethostname() in (tmp_path / "run.lease").read_text()
    who = f"process {os.getpid()} on elsewhere, which has {tmp_path}/run.lock"
    assert capsys.readouterr().err == f"waiting for {who}, for a sign of life, 1 s at most\n"


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_lease_that_names_nobody_ends_like_one_without_a_heartbeat(tmp_path, monkeypatch, make):
    """As a power cut may leave it."""
    monkeypatch.setattr(files, "LEASE_S", 0.2)
    monkeypatch.setattr(files, "SILENT_S", 0.1)
    make(tmp_path / "run.lease")
    with locked(tmp_path / "run.lock") as lease:
        assert lease.owner.pid == os.getpid()


def test_an_old_lease_that_names_nobody_is_not_waited_for(tmp_path, capsys):
    (tmp_path / "run.lease").touch()
    os.utime(tmp_path / "run.lease", times=(0, 0))
    with locked(tmp_path / "run.lock") as lease:
        assert lease.owner.pid == os.getpid()
    assert capsys.readouterr().err == ""


def test_a_lease_of_another_machine_that_lives_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LEASE_S", 1.0)
    lease = tmp_path / "run.lease"
    with locked(tmp_path / "run.lock"):
        record = lease.read_text()
    lease.write_text(record.replace(socket.gethostname(), "elsewhere"))
    ended = threading.Event()

    def beat():
        while not ended.wait(0.2):
            os.utime(lease)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(BusyError, match=f"process {os.getpid()} on elsewhere"), locked(tmp_path / "run.lock"):
            pass
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_lock_file_that_is_none_is_refused_in_a_line(tmp_path, make):
    make(tmp_path / "run.lock")
    with pytest.raises(UnwritableError, match=r"run\.lock could not be written"), locked(tmp_path / "run.lock"):
        pass


def test_the_reader_agrees_with_the_json_module_on_what_we_write(tmp_path):
    record = {"size": 2**40, "ratio": 1e-300, "text": 'é"\n\u2028😀', "nested": [{"a": None, "b": True}]}
    write_file(tmp_path / "a.json", json.dumps(record).encode())
    assert read_json(tmp_path / "a.json", Facts) == record
