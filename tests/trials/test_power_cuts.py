"""Power cuts: a preparation, a run and an export on an ext4 file system of their own, of which only what has reached
the disk is kept. The same command then ends in the same bytes as if the power had never failed.

The file system lies on a loop device, whose backing file holds what a disk would. At random moments the processes are
halted and that file is copied, without a sync before: what only the kernel's memory has is lost. Each copy is mounted,
which replays the journal as after a reboot.

Needs root, loop devices and mkfs.ext4. As a script this is the process that forks the commands.
"""

import gc
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))

from same_bytes import sums  # noqa: E402

pytestmark = pytest.mark.trial

MOMENTS = 20
WORDS = ["def", "return", "(", ")", ":", "\n", "self", "value", "=", "1", "naïve", "if"]
# A commit a minute and no early allocation for renamed files: what nobody has synced is lost.
OPTIONS = "commit=60,data=ordered,noauto_da_alloc"
COMMANDS = {
    "preparation": ["prepare_data.py", "--config", "{disk}/data.yaml"],
    "run": ["pretrain.py", "--config", "{disk}/tiny.yaml"],
    "export": ["export.py", "{disk}/runs/tiny", "--to=native"],
}
# The last line that each prints begins so; it is the announcement that all is there.
ANNOUNCEMENTS = {
    "preparation": "train on them:",
    "run": "sample from it:",
    "export": "{disk}/runs/tiny/exports/native:",
}


# --- the disk --------------------------------------------------------------------------------------------------------


def obstacle() -> str | None:
    """What keeps this machine from running these trials."""
    if os.geteuid() != 0:
        return "needs root, to mount a file system"
    missing = [tool for tool in ("mkfs.ext4", "losetup", "mount", "umount") if shutil.which(tool) is None]
    if missing:
        return f"needs {missing[0]}"
    if subprocess.run(["losetup", "-f"], capture_output=True).returncode != 0:
        return "needs a free loop device"
    return None


@contextmanager
def mounted(image: Path, disk: Path) -> Iterator[None]:
    """Has the file system of an image at `disk`; mounting one that was cut off replays its journal."""
    device = subprocess.run(
        ["losetup", "-f", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        subprocess.run(["mount", "-t", "ext4", "-o", OPTIONS, device, disk], check=True)
        try:
            yield
        finally:
            if subprocess.run(["umount", disk]).returncode != 0:  # a command that failed is still there
                subprocess.run(["umount", "--lazy", disk], check=True)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def copy(image: Path, target: Path) -> Path:
    """Copies what has reached the backing file, without a sync."""
    subprocess.run(["cp", "--sparse=always", image, target], check=True)
    return target


# --- the commands ----------------------------------------------------------------------------------------------------


class Commands:
    """The process that forks them; it has imported torch once for all."""

    def __init__(self, output: Path, disk: Path) -> None:
        self.output, self.disk, self.group = output, disk, 0
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def start(self, name: str) -> int:
        """Starts a command and returns its process group."""
        script, *arguments = (argument.format(disk=self.disk) for argument in COMMANDS[name])
        order = {"argv": [str(ROOT / "scripts" / script), *arguments], "output": str(self.output)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        said, group = self.process.stdout.readline().split()
        assert said == "started"
        self.group = int(group)
        return self.group

    def wait(self) -> None:
        said, code = self.process.stdout.readline().split()
        self.group = 0
        assert (said, code) == ("ended", "0"), self.output.read_text()

    def run(self, name: str) -> float:
        """Runs a command to its end, and returns how many seconds it took."""
        start = time.monotonic()
        self.start(name)
        self.wait()
        return time.monotonic() - start

    def close(self) -> None:
        if self.group:
            os.killpg(self.group, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@contextmanager
def halted(group: int) -> Iterator[bool]:
    """Stops all threads of a process group for the block; false where it has ended."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGSTOP)
    try:
        # A system call that was under way, an fsync for example, is finished first, as a disk finishes its sector.
        deadline = time.monotonic() + 30
        while not set(states(group)) <= {"T", "Z"}:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        yield "T" in states(group)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGCONT)


def states(group: int) -> list[str]:
    """The states of all threads of a process group."""
    found = []
    for file in Path("/proc").glob("[0-9]*/task/*/stat"):
        try:
            state, _, of_group = file.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(of_group) == group:
            found.append(state)
    return found


if __name__ == "__main__":
    import torch

    from gpt2x.command_line import parse_recipe  # noqa: F401
    from gpt2x.preflight import describe  # noqa: F401
    from gpt2x.preparation import prepare  # noqa: F401
    from gpt2x.publishing import native, reference  # noqa: F401
    from gpt2x.training import finish, start  # noqa: F401

    finish.write_plots = lambda directory: None  # takes longer than the run
    torch.set_num_threads(1)
    gc.freeze()  # else every child's first collection copies the pages of all that was imported


def child(order: dict) -> None:
    """The whole life of one command."""
    os.setpgid(0, 0)
    descriptor = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout.reconfigure(line_buffering=True)  # as on a terminal
    sys.argv, code = order["argv"], 1
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        os.setpgid(pid, pid)  # here and in the child: whichever comes first
        print("started", pid, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


# --- the trials ------------------------------------------------------------------------------------------------------


@dataclass
class Undisturbed:
    """A command that nothing has befallen."""

    before: Path
    """The image that it started from."""
    sums: dict[str, str]
    """What it left."""
    seconds: float
    """How long it took."""


@dataclass
class Cut:
    """What a power cut would have left."""

    image: Path
    """The disk."""
    printed: str
    """What the command had printed by then."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    if (found := obstacle()) is not None:
        pytest.skip(found)
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def commands(disk, tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("output") / "output.txt", disk)
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def undisturbed(disk, commands, tmp_path_factory):
    """What the three commands leave, one after the other, and the images between them."""
    images, found = tmp_path_factory.mktemp("images"), {}
    image = images / "disk.img"
    with image.open("wb") as file:
        file.truncate(96_000_000)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    with mounted(image, disk):
        write_inputs(disk)
    for name in COMMANDS:
        before = copy(image, images / f"{name}.img")
        with mounted(image, disk):
            commands.run(name)
            first = sums(disk)
        copy(before, image)
        with mounted(image, disk):
            seconds = commands.run(name)
            found[name] = Undisturbed(before=before, sums=sums(disk), seconds=seconds)
        assert difference(first, found[name].sums) == []
    return found


def write_inputs(disk: Path) -> None:
    """A few kilobytes of text, and the recipes: 30 steps with a record each, saved every seven."""
    (disk / "texts").mkdir()
    generator = random.Random(0)
    for number in range(30):
        text = " ".join(generator.choices(WORDS, k=generator.randint(40, 400)))
        (disk / "texts" / f"{number}.txt").write_text(text)
    preparation = {
        "output_dir": f"{disk}/shards",
        "corpus": {"kind": "files", "paths": [f"{disk}/texts/*.txt"], "validation_fraction": 0.2},
        "tokenizer": {"path": f"{disk}/tokenizer", "vocab_size": 280},
        "tokens_per_shard": 2000,
        "num_tasks": 3,
    }
    (disk / "data.yaml").write_text(yaml.safe_dump(preparation))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    run = {
        "run": {"dir": f"{disk}/runs"},
        "model": shape,
        "data": {"path": f"{disk}/shards", "sequence_length": 16},
        "train": {
            "max_steps": 30,
            "tokens_per_step": 128,
            "micro_batch_size": 8,
            "mixed_precision": "no",
            "num_threads": 1,
            "save_steps": 7,
            "logging_steps": 1,
        },
        "evaluation": {"eval_steps": 10, "num_validation_prompts": 1, "max_new_tokens": 4},
    }
    (disk / "tiny.yaml").write_text(yaml.safe_dump(run))


def cut_at_random(name: str, undisturbed: Undisturbed, commands: Commands, images: Path) -> list[Cut]:
    """What is on the disk at random moments of a command, and when it has ended.

    A command may be quicker than it was before, and ended at the last of its moments; then it begins again for those.
    """
    generator, cuts = random.Random(name), []
    image = images / "disk.img"
    while len(cuts) < MOMENTS:
        moments = sorted(generator.uniform(0, undisturbed.seconds) for _ in range(MOMENTS - len(cuts)))
        copy(undisturbed.before, image)
        with mounted(image, commands.disk):
            group, start, halted_s = commands.start(name), time.monotonic(), 0.0
            for moment in moments:
                while time.monotonic() - start - halted_s < moment:
                    time.sleep(0.001)
                stopped_at = time.monotonic()
                with halted(group) as is_alive:
                    if is_alive:
                        cuts.append(Cut(copy(image, images / f"{len(cuts)}.img"), commands.output.read_text()))
                halted_s += time.monotonic() - stopped_at
            commands.wait()
            at_its_end = Cut(copy(image, images / "end.img"), commands.output.read_text())
    return [*cuts, at_its_end]


@pytest.mark.parametrize("name", COMMANDS)
def test_after_a_power_cut_at_any_moment_the_same_command_ends_in_the_same_bytes(
    name, undisturbed, commands, disk, tmp_path
):
    expected = undisturbed[name].sums
    announcement = ANNOUNCEMENTS[name].format(disk=disk)
    cuts = cut_at_random(name, undisturbed[name], commands, tmp_path)
    assert announcement in cuts[-1].printed
    for cut in cuts:
        with mounted(cut.image, disk):
            let_a_minute_pass(disk)
            if announcement in cut.printed:
                left = sums(disk)
                lost = [file for file in expected if left.get(file) != expected[file]]
                assert lost == [], f"announced, and then lost: {cut.printed}"
            commands.run(name)
            assert difference(sums(disk), expected) == [], f"after a cut at: {cut.printed}"
        cut.image.unlink()


def let_a_minute_pass(disk: Path) -> None:
    """A machine takes that long to come back; a lease that somebody else might have is then without a heartbeat."""
    for lease in disk.rglob("*.lease"):
        os.utime(lease, times=(time.time() - 60, time.time() - 60))


def difference(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """The files that differ, are missing or are too many."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
