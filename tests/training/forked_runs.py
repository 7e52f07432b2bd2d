"""Runs of scripts/pretrain.py, or of another script, as real processes, forked from one that has imported torch: a
second less each.

As a script it is the process that forks; `ForkedRuns` is what tests talk to it with. A run may be told to kill itself
by SIGKILL at a named point: before or after the n-th call of a function.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "pretrain.py"


@dataclass
class ForkedRun:
    """A run that has been started, of one process or several."""

    pids: list[int]
    output_files: list[Path]
    driver: subprocess.Popen
    codes: list[int] | None = field(default=None)

    def send(self, number, *, rank=0):
        os.kill(self.pids[rank], number)

    def wait(self):
        """(exit code, negative for a signal; what was printed) of rank 0."""
        return self.wait_for_all()[0], self.output()

    def wait_for_all(self):
        """The exit code of every rank."""
        if self.codes is None:
            self.codes = [os.waitstatus_to_exitcode(status) for status in json.loads(self.driver.stdout.readline())]
        return self.codes

    def output(self, *, rank=0):
        return self.output_files[rank].read_text(errors="replace")

    def wait_until(self, condition):
        """Waits until something holds of the running process."""
        deadline = time.monotonic() + 60
        while not condition():
            os.kill(self.pids[0], 0)
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.002)


class ForkedRuns:
    """The process that forks, one run at a time."""

    def __init__(self, directory):
        self.directory, self.count = Path(directory), 0
        unwanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        environment = {key: value for key, value in os.environ.items() if key not in unwanted}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def start(self, *arguments, at=(), at_rank=None, patch=None, num_processes=1, script="pretrain.py"):
        """Starts a run.

        Args:
            arguments: of the script.
            at: signals that a process sends to itself, as `module:function:before or after:number of the call:SIGNAL`.
            at_rank: the only rank that does; None for all.
            patch: `module:function` of this directory, called in each process before the script.
            num_processes: ranks, which talk by gloo.
            script: another of the folder scripts.
        """
        self.count += 1
        outputs = [self.directory / f"output-{self.count}-{rank}.txt" for rank in range(num_processes)]
        order = {
            "argv": [str(argument) for argument in arguments],
            "outputs": [str(output) for output in outputs],
            "at": [at] if isinstance(at, str) else at,
            "at_rank": at_rank,
            "patch": patch,
            "port": free_port(),
            "script": str(SCRIPT.with_name(script)),
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return ForkedRun(json.loads(self.process.stdout.readline()), outputs, self.process)

    def run(self, *arguments, **options):
        """Starts a run and waits: (exit code, output) of rank 0."""
        return self.start(*arguments, **options).wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def read_records(run_dir, *, name="metrics.jsonl"):
    """The records of a run without what the clock says."""
    lines = (Path(run_dir) / name).read_text(encoding="utf-8").splitlines()
    clock = ("elapsed_s", "tokens_per_s", "data/waited_s")
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def read_tensors(checkpoint):
    """Every tensor of a checkpoint."""
    files = [checkpoint / "model" / "model.safetensors", checkpoint / "state" / "optimizer.safetensors"]
    return {f"{file.stem}/{name}": tensor.clone() for file in files for name, tensor in load_file(file).items()}


def files_of(run_dir):
    return {path.relative_to(run_dir).as_posix() for path in Path(run_dir).rglob("*")}


# --- the process that forks ------------------------------------------------------------------------------------------


def signal_at(point):
    """Replaces a function by one that signals the process before or after its n-th call."""
    module, name, when, number, sent = point.split(":")
    owner = importlib.import_module(module)
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    name = name.split(".")[-1]
    original, calls = getattr(owner, name), []

    def signalling(*arguments, **options):
        calls.append(None)
        is_due = len(calls) == int(number)
        if is_due and when == "before":
            os.kill(os.getpid(), signal.Signals[sent])
        result = original(*arguments, **options)
        if is_due and when == "after":
            os.kill(os.getpid(), signal.Signals[sent])
        return result

    setattr(owner, name, signalling)


def child(order, rank):
    """The whole life of one rank."""
    descriptor = os.open(order["outputs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - the orders are not the script's to read
    if (num_processes := len(order["outputs"])) > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(order["port"]), "ACCELERATE_USE_CPU": "true"}
    if order["patch"]:
        module, name = order["patch"].split(":")
        getattr(importlib.import_module(module), name)()
    for point in order["at"] if order["at_rank"] in (None, rank) else ():
        signal_at(point)
    sys.argv, code = [order["script"], *order["argv"]], 1
    try:
        runpy.run_path(order["script"], run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking down what was imported takes longer than the run


def main():
    import torch

    from gpt2x.command_line import parse_recipe  # noqa: F401
    from gpt2x.preflight.before_step_1 import describe  # noqa: F401
    from gpt2x.training import finish, start  # noqa: F401

    finish.write_plots = lambda directory: None  # takes longer than the run
    torch.set_num_threads(1)
    gc.freeze()  # else every child's first collection copies the pages of all that was imported
    for line in sys.stdin:
        order, pids = json.loads(line), []
        for rank in range(len(order["outputs"])):
            pids.append(os.fork())
            if pids[-1] == 0:
                child(order, rank)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitpid(pid, 0)[1] for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
