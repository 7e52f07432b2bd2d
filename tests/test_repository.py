"""What holds for the repository as a whole, not for one package of it."""

import configparser
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from _pytest.outcomes import Failed

ROOT = Path(__file__).parents[1]
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
HARDWARE_KEYS = {
    "compute_environment",
    "distributed_type",
    "fsdp_config",
    "gpu_ids",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "main_training_function",
    "num_machines",
    "num_processes",
    "parallelism_config",
    "rdzv_backend",
    "same_network",
    "use_cpu",
}
LARGEST_FILE = 1_000_000


def files_of_the_repository() -> list[Path]:
    """What git tracks or would track; without git (a release archive), every file that is not hidden."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def launch(command: list[str | Path]) -> str:
    """Runs a tool of this environment, whether or not the environment is activated."""
    tool = Path(sys.executable).parent / str(command[0])
    finished = subprocess.run([tool, *command[1:]], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("config_file", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_an_accelerate_config_names_hardware_only(config_file):
    config = yaml.safe_load(config_file.read_text())
    assert set(config) <= HARDWARE_KEYS
    assert {"distributed_type", "use_cpu", "num_machines", "num_processes"} <= set(config)


@pytest.mark.parametrize("config_file", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_accelerate_config(config_file):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(config_file))
    assert loaded.num_processes == yaml.safe_load(config_file.read_text())["num_processes"]


@pytest.mark.trial
def test_two_cpu_processes_really_are_one_group_of_two(tmp_path):
    """Other spellings of the same wish silently start two runs that know nothing of each other."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch\n"
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator(cpu=not torch.accelerator.is_available())\n"
        "ranks = accelerator.gather(torch.tensor([accelerator.process_index], device=accelerator.device)).tolist()\n"
        "if accelerator.is_main_process:\n"
        "    print('ranks', ranks, flush=True)\n"
        "accelerator.end_training()\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config_file = ROOT / "accelerate_configs" / "cpu_2_processes.yaml"
    command = ["accelerate", "launch", "--config_file", config_file, "--main_process_port", str(port), script]
    assert "ranks [0, 1]" in launch(command)


def test_the_package_list_equals_the_packages_on_disk():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    on_disk = {
        ".".join(init_file.parent.relative_to(ROOT).parts)
        for top in ("gpt2x", "modeling_gpt2x")
        for init_file in (ROOT / top).rglob("__init__.py")
    }
    assert set(setup["options"]["packages"].split()) == on_disk


def test_every_folder_of_modules_is_a_package():
    for top in ("gpt2x", "modeling_gpt2x"):
        for module_file in (ROOT / top).rglob("*.py"):
            # The modules of `evaluate` are loaded by the path of their folder, which is no package.
            if module_file.parents[1].name != "metrics":
                assert module_file.with_name("__init__.py").is_file(), module_file


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_every_requirement_has_a_tested_version():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    required = {line.split(">=")[0] for text in lists for line in text.split() if not line.startswith("#")}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert {normal(name) for name in required} <= {normal(name) for name in pinned}


@pytest.mark.parametrize(
    ("arguments", "is_offline"),
    [
        ("", True),
        (" ", True),
        ("--config configuration/pretrain/stream-fineweb-edu.yaml", False),
        ("--init_from a/b", False),
    ],
)
def test_make_keeps_only_the_quickstart_as_it_is_off_the_network(tmp_path, arguments, is_offline):
    (tmp_path / "installed").touch()  # else make would list how the environment is made
    command = ["make", "--dry-run", "-C", str(ROOT), f"VENV={tmp_path}", f"ARGS={arguments}", "pretrain"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in shown.splitlines() if "scripts/pretrain.py" in line]
    assert ("HF_HUB_OFFLINE=1" in line) == is_offline
    assert line.rstrip().endswith(f"scripts/pretrain.py {arguments}".rstrip())


def test_no_file_is_larger_than_a_megabyte():
    assert [file for file in files_of_the_repository() if file.stat().st_size > LARGEST_FILE] == []


def test_a_test_that_reaches_for_the_network_fails():
    message = r"the test connects to \('192\.0\.2\.1', 80\); tests are offline"
    with socket.socket() as connecting, pytest.raises(Failed, match=message):
        connecting.connect(("192.0.2.1", 80))


def test_loopback_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
