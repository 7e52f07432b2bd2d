"""Every launch configuration is one that accelerate understands; what starts otherwise than meant is refused."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from gpt2x.distributed.devices import compute_device
from gpt2x.distributed.launch import (
    asks_for_sharding,
    check_launch,
    check_launch_of_adapters,
    num_data_ranks,
    passed_over,
)
from gpt2x.errors import UserError
from gpt2x.run import _accelerator

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
HARDWARE = {"compute_environment", "distributed_type", "use_cpu", "num_machines", "num_processes", "machine_rank"} | {
    f"main_process_{part}" for part in ("ip", "port")
}
HARDWARE |= {"gpu_ids", "rdzv_backend", "same_network", "fsdp_config", "parallelism_config"}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config_file(request):
    return request.param


def test_accelerates_own_classes_read_every_configuration(config_file):
    config = load_config_from_file(str(config_file))
    given = yaml.safe_load(config_file.read_text())
    assert config.num_processes == given["num_processes"]
    assert config.distributed_type.value == given["distributed_type"]


def test_configurations_speak_of_hardware_alone(config_file):
    given = yaml.safe_load(config_file.read_text())
    assert set(given) <= HARDWARE
    assert given.get("fsdp_config", {}).get("fsdp_activation_checkpointing", False) is False


def test_sizes_of_a_parallelism_multiply_to_the_processes(config_file):
    given = yaml.safe_load(config_file.read_text())
    sizes = given.get("parallelism_config", {})
    product = 1
    for size in sizes.values():
        product *= size
    assert not sizes or product == given["num_processes"]


def test_the_launcher_takes_every_configuration_and_lets_its_numbers_be_overridden(config_file):
    arguments = ["--config_file", str(config_file), "--num_processes", "4", "script.py"]
    found, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    given = yaml.safe_load(config_file.read_text())
    assert found.num_processes == 4
    assert found.use_fsdp == (given["distributed_type"] == "FSDP")
    assert found.num_machines == given["num_machines"]
    if found.use_fsdp:
        assert (found.fsdp_version, found.fsdp_auto_wrap_policy) == (2, "TRANSFORMER_BASED_WRAP")


@pytest.fixture
def gpus(monkeypatch):
    """A machine that has them, as far as torch says, and as far as an environment lets them be seen."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))


@pytest.mark.parametrize("name", ["cpu", "single_gpu"])
def test_one_process_computes_where_its_configuration_says(gpus, name):
    config_file = str(ROOT / "accelerate_configs" / f"{name}.yaml")
    found, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config_file, "x.py"]))
    _, environment = prepare_simple_launcher_cmd_env(found)
    assert compute_device(environment).type == {"cpu": "cpu", "single_gpu": "cuda"}[name]


def test_two_processes_on_the_cpu_see_no_gpu():
    """The launcher tells several processes nothing of use_cpu."""
    config_file = str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml")
    arguments = ["--config_file", config_file, "--main_process_port=0", "x.py"]
    found, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert prepare_multi_gpu_env(found)["CUDA_VISIBLE_DEVICES"] == "-1,-1"


def test_a_run_that_the_launcher_puts_on_the_cpu_knows_it_where_there_is_a_gpu(gpus, recipe, changed):
    environment = {"ACCELERATE_USE_CPU": "True"}
    accelerator = _accelerator(changed(recipe, train={"num_threads": 2}), environment)
    assert (accelerator.device.type, torch.get_num_threads()) == ("cpu", 2)
    with pytest.raises(UserError, match=r"mixed_precision \(fp16\) needs a GPU, and this run is on the CPU; use bf16"):
        _accelerator(changed(recipe, train={"mixed_precision": "fp16"}), environment)


def run_script(*launcher, environment=None):
    """What scripts/pretrain.py answers under a launcher: (exit code, last line of our process)."""
    whole = [*launcher, str(ROOT / "scripts" / "pretrain.py"), "--train.max_steps=1"]
    inherited = {key: value for key, value in os.environ.items() if key not in ("MASTER_ADDR", "RANK")}
    finished = subprocess.run(
        whole, capture_output=True, text=True, cwd=ROOT, env=inherited | (environment or {}), timeout=60
    )
    return finished.returncode, finished.stderr


def test_a_launcher_that_started_one_process_instead_of_two_is_refused():
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2"]
    code, said = run_script(*launcher)
    assert code != 0
    assert "accelerate launch was asked for several processes (MASTER_ADDR is set)" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_know_nothing_of_each_other_are_refused(name):
    with pytest.raises(UserError, match=rf"{name} \(4\) processes were started that would each train alone"):
        check_launch({name: "4"})


def sizes(*, world, **given):
    """What the launcher tells a process of the sizes of parallelism."""
    named = {f"PARALLELISM_CONFIG_{kind.upper()}_SIZE": str(size) for kind, size in given.items()}
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return {"RANK": "0", "WORLD_SIZE": str(world), "ACCELERATE_USE_PARALLELISM_CONFIG": "true"} | fsdp | named


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, r"fsdp_version \(1\) must be 2"),
        ({"RANK": "0", "ACCELERATE_USE_MEGATRON_LM": "true"}, r"distributed_type \(MEGATRON_LM\) must be FSDP or"),
        (
            {"RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true"},
            r"^distributed_type \(DEEPSPEED\) must be FSDP; use accelerate_configs/fsdp2\.yaml, which does more\.$",
        ),
        (sizes(cp=2, world=2), r"parallelism_config_cp_size \(2\) must be 1: every process reads whole rows"),
        (sizes(sp=2, world=2), r"parallelism_config_sp_size \(2\) must be 1"),
        (sizes(tp=2, dp_shard=4, world=6), r"\(1 x 4 x 2\) must be num_processes \(6\); .*dp_shard_size 3"),
        (sizes(dp_replicate=2, dp_shard=2, world=8), r"\(2 x 2 x 1\) must be num_processes \(8\); .*dp_shard_size 4"),
        (
            sizes(tp=2, world=2) | {"ACCELERATE_USE_FSDP": "false"},
            r"tp_size \(2\) and dp_shard_size \(1\) need distributed_type FSDP; set it, as in fsdp2_tp\.yaml",
        ),
        (sizes(tp=2, dp_replicate=2, world=4), r"dp_replicate_size \(2\) with tp_size \(2\) needs a dp_shard_size"),
    ],
)
def test_what_a_configuration_asks_for_and_is_not_done_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        check_launch(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "10.0.0.1"},
        {"ACCELERATE_MIXED_PRECISION": "no"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"},
        {"RANK": "0", "SLURM_STEP_NUM_TASKS": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        {"RANK": "0", "ACCELERATE_USE_DEEPSPEED": "false"},
        sizes(tp=2, dp_shard=1, world=2),
        sizes(tp=2, dp_shard=2, dp_replicate=2, world=8),
    ],
)
def test_one_process_alone_and_ranks_of_a_launcher_are_let_through(environment):
    check_launch(environment)


LEFTOVERS = {
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_MIXED_PRECISION": "fp8",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
}


def test_what_a_launch_configuration_says_and_the_recipe_decides_is_told(recipe):
    lines = passed_over(LEFTOVERS, recipe)
    assert [line.split(" of the launch configuration is passed over: ")[0] for line in lines] == [
        "dynamo_backend (eager)",
        "mixed_precision (fp8)",
        "gradient_accumulation_steps (4)",
    ]
    assert lines[0].endswith("the recipe's train.torch_compile (false) counts.")
    defaults = {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "no"}
    assert passed_over(defaults, recipe) == passed_over({}, recipe) == []


def test_leftovers_of_a_launch_configuration_change_no_number_of_a_run(
    recipe, changed, pretrain, monkeypatch, tmp_path, assert_equal_tensors
):
    """accelerate alone would compile the model, whose names then fit no checkpoint, and quarter the gradients."""
    recipe = changed(recipe, train={"max_steps": 2, "max_grad_norm": None})
    expected = pretrain(recipe)
    for name, value in LEFTOVERS.items():
        monkeypatch.setenv(name, value)
    found = pretrain(changed(recipe, run={"dir": tmp_path / "leftovers"}))
    assert found.records() == expected.records()
    assert_equal_tensors(found.saved(), expected.saved())


# In place of SLURM and of the launcher, which waits for a signal where it is told to.
FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" >> "$OUT/requeued"; fi',
    "srun": 'exec "$@"',
    "accelerate": """printf '%s\\n' "$@" > "$OUT/arguments"
trap 'exit 1' TERM
if [ -n "$WAITS" ]; then touch "$OUT/waits"; while true; do sleep 0.05; done; fi
exit 3""",
}


@pytest.fixture
def slurm_job(tmp_path):
    """Starts the SLURM template's script on what stands for a cluster."""
    for name, lines in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    script = ["bash", str(ROOT / "docs" / "examples" / "pretrain.slurm"), "--run.name", "two words"]

    def start(**environment):
        path = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.Popen(script, env={**os.environ, **job, "PATH": path, "OUT": str(tmp_path), **environment})

    return start


def test_the_slurm_template_starts_a_launcher_that_accelerate_understands(slurm_job, tmp_path):
    assert slurm_job(WAITS="").wait(timeout=20) == 3
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[0] == "launch"
    found, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments[1:]))
    assert (found.num_machines, found.num_processes, found.machine_rank, found.main_process_ip) == (2, 16, 1, "first")
    assert found.use_fsdp
    assert [found.training_script, *found.training_script_args] == ["scripts/pretrain.py", "--run.name", "two words"]
    assert not (tmp_path / "requeued").exists()


def test_the_slurm_template_goes_back_into_the_queue_when_it_is_told_to_end(slurm_job, tmp_path):
    job = slurm_job(WAITS="1")
    deadline = time.monotonic() + 20
    while not (tmp_path / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.terminate()
    assert job.wait(timeout=20) == 1
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, 1), ({"WORLD_SIZE": "8"}, 8), (sizes(tp=2, dp_shard=4, world=8), 4)]
)
def test_processes_of_a_tensor_parallel_group_are_one_rank_of_the_data(environment, expected):
    assert num_data_ranks(environment) == expected


def test_adapters_are_not_trained_beside_a_cut_model():
    check_launch_of_adapters({})
    message = "lora needs the whole model on every device, and the launch configuration cuts it; use ddp.yaml"
    with pytest.raises(UserError, match=f"^{message}"):
        check_launch_of_adapters({"ACCELERATE_USE_FSDP": "true"})


def test_only_fsdp_is_sharding():
    assert asks_for_sharding({"ACCELERATE_USE_FSDP": "true"})
    assert not asks_for_sharding({"ACCELERATE_USE_FSDP": "false"})
    assert not asks_for_sharding({})
