"""Exports appear whole or not at all, whatever ends the process that writes them, and take nothing else's place."""

import contextlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2x.errors import UserError
from gpt2x.publishing.output import check_output, size_bytes, whole_or_nothing

ROOT = Path(__file__).parents[2]
CONFIG = '{"model_type": "llama", "hidden_size": 32, "dtype": "float32"}'


def names(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def export_onnx(output_dir, *, name="model.onnx", config=CONFIG):
    with whole_or_nothing(output_dir) as partial:
        (partial / "onnx").mkdir()
        (partial / "onnx" / name).write_text(name)
        (partial / "config.json").write_text(config)


def test_a_finished_export_is_there_and_nothing_beside_it(tmp_path):
    with whole_or_nothing(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out", "out/config.json"]
    assert size_bytes(tmp_path / "out") == 2


def test_a_failed_export_leaves_nothing(tmp_path):
    with contextlib.suppress(UserError), whole_or_nothing(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
        raise UserError("it computes something else")
    assert names(tmp_path) == []


def test_a_killed_export_leaves_no_model_and_the_next_one_succeeds(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from gpt2x.publishing.output import whole_or_nothing\n"
        "with whole_or_nothing(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], cwd=ROOT)
    assert killed.returncode == -9
    assert not (tmp_path / "out").exists()
    with whole_or_nothing(tmp_path / "out") as partial:
        (partial / "whole").write_text("whole")
    assert names(tmp_path) == ["out", "out/whole"]


def test_a_directory_of_the_users_own_with_a_similar_name_is_kept(tmp_path):
    for name in ("out.partial", "out.tmp", "out.tmp-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    before = names(tmp_path)
    export_onnx(tmp_path / "out")
    assert [name for name in names(tmp_path) if name.split("/")[0] != "out"] == before


def test_another_precision_joins_the_first_and_what_the_user_added_stays(tmp_path):
    export_onnx(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    other = CONFIG.replace("float32", "float16")
    export_onnx(tmp_path / "out", name="model_fp16.onnx", config=other)
    assert names(tmp_path / "out") == ["config.json", "notes.txt", "onnx", "onnx/model.onnx", "onnx/model_fp16.onnx"]
    assert (tmp_path / "out" / "config.json").read_text() == other


def test_when_an_export_is_announced_its_files_and_names_are_on_the_disk(tmp_path, monkeypatch):
    """Every file and directory is synced after its last change; that of the lock alone comes later."""
    synced = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(identity(os.fstat(file))) or fsync(file))
    for name in ("model.onnx", "model_fp16.onnx"):
        synced.clear()
        export_onnx(tmp_path / "new" / "out", name=name)
        written = [tmp_path / "new" / "out" / "onnx", tmp_path / "new" / "out" / "onnx" / name]
        written += [tmp_path / "new" / "out" / "config.json"]
        assert {identity(path.stat()) for path in written} <= synced
    synced.clear()
    export_onnx(tmp_path / "newer" / "out")
    inodes = {inode for inode, _ in synced}
    assert {path.stat().st_ino for path in (tmp_path, tmp_path / "newer")} <= inodes


def identity(status):
    """Changes with every write to a file, and every change of a directory's names."""
    return status.st_ino, status.st_mtime_ns


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o002)
    try:
        with whole_or_nothing(tmp_path / "out") as partial:
            os.close(os.open(partial / "model.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o664


@pytest.mark.parametrize("exists", [False, True])
def test_two_exports_to_one_place_at_the_same_time_both_succeed(tmp_path, exists):
    if exists:
        export_onnx(tmp_path / "out")
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "from test_whole_exports import export_onnx\n"
        "Path(sys.argv[2]).touch()\n"
        "while len(list(Path(sys.argv[2]).parent.iterdir())) < 2: time.sleep(0.001)\n"
        "for number in range(10): export_onnx(Path(sys.argv[1]), name=Path(sys.argv[2]).name + '.onnx')"
    )
    (tmp_path / "started").mkdir()
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "out", tmp_path / "started" / name, Path(__file__).parent],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for name in ("one", "two")
    ]
    for process in pair:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    first = ["onnx/model.onnx"] if exists else []
    assert names(tmp_path / "out") == ["config.json", "onnx", *first, "onnx/one.onnx", "onnx/two.onnx"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "started"}


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    message = r"output \(.*out\) must be a directory, but is a file; give another by --output"
    with pytest.raises(UserError, match=message), whole_or_nothing(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (["model/weights.bin"], "it holds model; "),
        (["config.json", "model.safetensors"], "it holds config.json, model.safetensors; "),
        (["a", "b", "c", "d", "e"], "it holds a, b, c and 2 more; "),
    ],
)
def test_a_directory_that_is_no_export_is_refused_and_kept(tmp_path, held, said):
    for name in held:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    before = names(tmp_path)
    with pytest.raises(UserError, match=rf"output \(.*out\) is no export: {said}give another by --output"):
        export_onnx(tmp_path / "out")
    assert names(tmp_path) == before


@pytest.mark.parametrize(("place", "record"), [("final", "config.yaml"), ("model", "manifest.json")])
def test_the_model_of_a_run_in_gpt2xs_own_form_is_no_export(tmp_path, place, record):
    (tmp_path / place).mkdir()
    for name in (record, f"{place}/config.json", f"{place}/modeling_gpt2x.py"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"is no export: it holds config\.json, modeling_gpt2x\.py; give another by"):
        check_output(tmp_path / place)


@pytest.mark.parametrize("content", [CONFIG.replace("32,", "64,"), "{", "[1]"])
def test_an_export_of_another_model_is_refused_and_kept(tmp_path, content):
    export_onnx(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(content)
    message = (
        r"(holds an export of another model \(hidden_size 64, not 32\)|is no JSON|is not as gpt2x writes it).*delete"
    )
    with pytest.raises(UserError, match=message):
        export_onnx(tmp_path / "out", name="model_fp16.onnx")
    assert names(tmp_path) == ["out", "out/config.json", "out/onnx", "out/onnx/model.onnx"]


def test_the_working_directory_is_written_to_where_it_is_empty_and_refused_where_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_onnx(Path("."))
    assert names(tmp_path) == ["config.json", "onnx", "onnx/model.onnx"]
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"output \(\.\) is no export: it holds .* more; give another by --output"):
        export_onnx(Path("."))


@pytest.mark.parametrize(
    ("output", "reason"),
    [("file/out", "File exists"), ("x" * 300, "File name too long"), ("/sys/out", "Permission denied")],
)
def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path, output, reason):
    (tmp_path / "file").write_text("mine")
    message = rf"could not be written \({reason}[^\n]*\); mend that, and the same command tries again\.$"
    with pytest.raises(UserError, match=message):
        export_onnx(tmp_path / output)
    assert names(tmp_path) == ["file"]


def test_a_link_to_a_directory_elsewhere_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    export_onnx(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk") == ["config.json", "onnx", "onnx/model.onnx"]


def test_what_was_put_there_during_the_export_is_kept(tmp_path):
    def export():
        with whole_or_nothing(tmp_path / "out") as partial:
            (partial / "config.json").write_text(CONFIG)
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").write_text("mine")

    with pytest.raises(UserError, match="is no export: it holds mine"):
        export()
    assert names(tmp_path) == ["out", "out/mine"]
    assert size_bytes(tmp_path / "out") == 4
