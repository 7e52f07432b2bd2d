"""A file is read through once, and what was found is remembered for as long as the file stays what it is."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from gpt2x import scan as scanning
from gpt2x.errors import UserError
from gpt2x.scan import Scan, remembered, scan_all

TOKENS = np.random.default_rng(0).integers(3, 400, 10_000).astype(np.uint16)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "gpt2x"


@pytest.fixture
def file(tmp_path) -> Path:
    TOKENS.tofile(tmp_path / "tokens.bin")
    return tmp_path / "tokens.bin"


@pytest.fixture
def never_again(monkeypatch):
    """Fails the test that reads a file once more after this was called."""

    def fail(file, tokens):
        raise AssertionError(f"{file} is read again")

    return lambda: monkeypatch.setattr(scanning, "_scan", fail)


def scan(file: Path, tokens: np.ndarray) -> Scan:
    (found,) = scan_all([(file, tokens)])
    return found


def mapped(file: Path) -> np.ndarray:
    return np.asarray(np.memmap(file, np.uint16, mode="r"))


@pytest.mark.parametrize("chunk_bytes", [1, 999, 2**23])
def test_a_scan_finds_the_sha256_and_the_range_of_the_ids(file, chunk_bytes, monkeypatch):
    monkeypatch.setattr(scanning, "CHUNK_BYTES", chunk_bytes)
    found = scan(file, mapped(file))
    assert found["sha256"] == hashlib.sha256(TOKENS.tobytes()).hexdigest()
    assert (found["smallest_id"], found["largest_id"]) == (min(TOKENS), max(TOKENS))


def test_extreme_ids_are_seen_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "CHUNK_BYTES", 64)
    for position in range(0, 200, 7):
        file, ids = tmp_path / f"{position}.bin", np.full(201, 9, np.uint16)
        ids[position], ids[-1 - position] = 5, 700
        ids.tofile(file)
        found = scan(file, mapped(file))
        assert (found["smallest_id"], found["largest_id"]) == (min(ids), max(ids))


def test_a_file_that_is_known_is_not_read_again(file, never_again):
    first = scan(file, mapped(file))
    never_again()
    assert scan(file, mapped(file)) == first


@pytest.mark.parametrize("change", ["content", "size", "dtype"])
def test_a_file_that_has_changed_is_read_again(file, change):
    first, tokens = scan(file, mapped(file)), TOKENS.copy()
    if change == "content":
        tokens[5] = 0
    tokens[: 9000 if change == "size" else None].tofile(file)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + (change == "content")))
    now = mapped(file).view(np.uint8) if change == "dtype" else mapped(file)
    assert scan(file, now)["smallest_id"] == now.min()
    assert scan(file, now) != first


def test_an_answer_of_a_broken_cache_is_not_believed(file, cache_dir):
    first = scan(file, mapped(file))
    (kept,) = cache_dir.glob("scan-*.json")
    of = json.loads(kept.read_text())["of"]
    answers = [{}, {"sha256": "0"}, {**first, "blocks": 3}, {**first, "smallest_id": "1"}, [], None]
    contents = ["", "{", "[]", "{}", "[" * 100_000, json.dumps({"of": {}, "answer": first})]
    for content in [*contents, *(json.dumps({"of": of, "answer": answer}) for answer in answers)]:
        kept.write_text(content)
        assert scan(file, mapped(file)) == first


def test_a_pipe_in_the_cache_is_replaced_and_not_waited_for(file, cache_dir):
    first = scan(file, mapped(file))
    (kept,) = cache_dir.glob("scan-*.json")
    kept.unlink()
    os.mkfifo(kept)
    assert scan(file, mapped(file)) == first
    assert kept.is_file()


def test_a_cache_that_cannot_be_written_is_no_error(file, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "a file"))
    assert scan(file, mapped(file))["sha256"] == hashlib.sha256(TOKENS.tobytes()).hexdigest()


def test_many_processes_look_once(tmp_path, cache_dir):
    code = (
        "import sys, time\n"
        "from huggingface_hub import constants\n"
        "from gpt2x.scan import remembered\n"
        f"constants.HF_HOME = {str(cache_dir.parent)!r}\n"
        "def look():\n"
        f"    with open({str(tmp_path / 'looks')!r}, 'a') as stream:\n"
        "        stream.write('once\\n')\n"
        "    time.sleep(0.3)\n"
        "    return {'seen': 7}\n"
        "print(remembered('test', {'a': 1}, look, shape=dict[str, int])['seen'])\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0] for process in processes] == ["7\n"] * 4
    assert (tmp_path / "looks").read_text() == "once\n"
    assert [file.suffix for file in cache_dir.iterdir()] == [".json"]


def asked(question, of, answer):
    return remembered(question, of, lambda: answer, shape=dict[str, int])


def test_another_question_has_another_answer():
    assert asked("a", {"x": 1}, {"answer": 1}) == {"answer": 1}
    assert asked("a", {"x": 2}, {"answer": 2}) == {"answer": 2}
    assert asked("b", {"x": 1}, {"answer": 3}) == {"answer": 3}
    assert asked("a", {"x": 1}, {"answer": 4}) == {"answer": 1}


def changed_on_the_disk(file, position):
    """A bit flips, which changes neither the size of the file nor its time."""
    content, times = bytearray(file.read_bytes()), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    content[position] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=times)


@pytest.mark.parametrize("position", [0, 4095, 4096, 9999, 19_999])
def test_a_small_file_is_compared_whole_at_every_start(file, monkeypatch, position):
    monkeypatch.setattr(scanning, "BLOCK_BYTES", 4096)
    first = scan(file, mapped(file))
    assert first["blocks"] == [
        hashlib.sha256(TOKENS.tobytes()[at : at + 4096]).hexdigest()[:16] for at in range(0, 20_000, 4096)
    ]
    changed_on_the_disk(file, position)
    where = f"from byte {position // 4096 * 4096:,} on"
    with pytest.raises(
        UserError, match=rf"tokens.bin: its content has changed, though .* {where} is not what was read"
    ):
        scan(file, mapped(file))
    changed_on_the_disk(file, position)
    assert scan(file, mapped(file)) == first


def test_of_a_large_file_other_blocks_are_compared_at_every_start(tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "BLOCK_BYTES", 512)
    monkeypatch.setattr(scanning, "SAMPLE_BYTES", 2048)
    files = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for file in files:
        TOKENS.tofile(file)
    list(scan_all([(file, mapped(file)) for file in files]))
    compared, compare = [], scanning._compare_block
    note = lambda file, number, blocks: (compared.append((file, number)), compare(file, number, blocks))  # noqa: E731
    monkeypatch.setattr(scanning, "_compare_block", note)
    # Each of the 80 blocks is missed by 500 starts once in 10**11 times.
    for start in range(1, 501):
        list(scan_all([(file, mapped(file)) for file in files]))
        assert len(compared) == 4 * start
    assert set(compared) > {(file, number) for file in files for number in (0, 39)}
    changed_on_the_disk(files[1], 19_999)

    def start_often():
        for _ in range(500):
            list(scan_all([(file, mapped(file)) for file in files]))

    with pytest.raises(UserError, match=r"b.bin: its content has changed.* from byte 19,968 on"):
        start_often()


def test_what_takes_long_is_announced_in_one_line(file, monkeypatch, capsys):
    scan(file, mapped(file))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(scanning, "LARGE_BYTES", 20_000)
    os.utime(file, ns=(0, 0))
    scan(file, mapped(file))
    assert capsys.readouterr().err == f"{file.parent}: checking what is new there, once (0.0 GB)\n"
    scan(file, mapped(file))
    assert capsys.readouterr().err == ""


def test_memory_does_not_grow_with_the_file(tmp_path):
    file = tmp_path / "large.bin"
    with file.open("wb") as stream:
        stream.truncate(2**28)  # sparse: a quarter of a gigabyte that takes no room
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from gpt2x.scan import _scan\n"
        "file = Path(sys.argv[1])\n"
        "used = int(Path('/proc/self/statm').read_text().split()[5]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 2**25, -1))\n"
        "print(_scan(file, np.memmap(file, np.uint16, mode='r'))['sha256'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(bytes(2**28)).hexdigest(), done.stderr
