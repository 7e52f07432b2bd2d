"""Scripts of tests as the ranks of accelerate launch: real processes on this machine's CPU.

As a script it runs another in its place and then tells whether that one's talk between the processes has ended.
"""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(config, *command):
    """accelerate launch of a configuration on this machine's CPU; of the command first options, then the script."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", f"--main_process_port={port}"]
    whole = [*launcher, "--config_file", str(ROOT / "accelerate_configs" / config), *map(str, command)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    return subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment)


def leave():
    """Ends a rank whose models still hold the process group.

    A thread of theirs may ask for Python's lock while Python ends, and a thread that is refused it aborts the process.
    """
    from accelerate.state import PartialState

    PartialState().destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def gloo_threads():
    """The names of this process's threads that talk to other processes."""
    names = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    return sorted(name for name in names if "gloo" in name)


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(ROOT)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(f"rank {os.environ['RANK']} leaves {gloo_threads()}", flush=True)
