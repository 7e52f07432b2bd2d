"""What a launcher has made of its configuration, told before torch is imported."""

import os
import sys
from collections.abc import Mapping

from gpt2x.config import TrainingRecipe
from gpt2x.errors import UserError

# How many processes srun and mpirun tell each of theirs that they have started.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def asks_for_sharding(environment: Mapping[str, str]) -> bool:
    """Whether the launch configuration asks for FSDP2."""
    return environment.get("ACCELERATE_USE_FSDP") == "true"


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuses what would run, but not as it was meant.

    Args:
        environment: of this process, as the launcher left it.

    Raises:
        UserError: for several processes that do not know of each other; for what a launch configuration asks for and
            gpt2x does not do.
    """
    if "RANK" not in environment:
        _check_alone(environment)
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "distributed_type (DEEPSPEED) must be FSDP; use accelerate_configs/fsdp2.yaml, which does more."
        )
    if environment.get("ACCELERATE_USE_MEGATRON_LM") == "true":
        raise UserError("distributed_type (MEGATRON_LM) must be FSDP or MULTI_GPU; use fsdp2_tp.yaml, or fsdp2.yaml.")
    if asks_for_sharding(environment) and environment.get("FSDP_VERSION", "1") != "2":
        raise UserError("fsdp_version (1) must be 2; set it in the launch configuration, as in fsdp2.yaml.")
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        _check_sizes(environment)


def passed_over(environment: Mapping[str, str], recipe: TrainingRecipe) -> list[str]:
    """A line for each thing that a launch configuration says and the recipe decides, where they differ."""
    train = recipe.train
    decided = (
        ("dynamo_backend", ("no",), f"train.torch_compile ({str(train.torch_compile).lower()})"),
        # the launcher says no where nobody has said anything
        ("mixed_precision", ("no", train.mixed_precision), f"train.mixed_precision ({train.mixed_precision})"),
        ("gradient_accumulation_steps", ("1",), f"train.tokens_per_step ({train.tokens_per_step})"),
    )
    given = [
        (name, environment.get(f"ACCELERATE_{name.upper()}", same[0]), same, ours) for name, same, ours in decided
    ]
    return [
        f"{name} ({value.lower()}) of the launch configuration is passed over: the recipe's {ours} counts."
        for name, value, same, ours in given
        if value.lower() not in same
    ]


def check_launch_of_adapters(environment: Mapping[str, str]) -> None:
    """Refuses to cut what adapters are trained beside.

    Raises:
        UserError: where the launch configuration asks for shards.
    """
    if asks_for_sharding(environment):
        raise UserError(
            "lora needs the whole model on every device, and the launch configuration cuts it; use ddp.yaml, or leave "
            "lora out."
        )


def num_data_ranks(environment: Mapping[str, str]) -> int:
    """How many processes of the run read different rows; those of a tensor-parallel group read the same ones."""
    return int(environment.get("WORLD_SIZE", "1")) // _size(environment, "tp")


def usable_cores(num_processes: int = 1) -> int:
    """Cores for each process, where those of this machine are shared fairly among so many."""
    available = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(available // num_processes, 1)


def _size(environment: Mapping[str, str], kind: str) -> int:
    return int(environment.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "1"))


def _check_sizes(environment: Mapping[str, str]) -> None:
    """Of the dimensions of parallelism."""
    for kind in ("cp", "sp"):
        if (size := _size(environment, kind)) != 1:
            raise UserError(
                f"parallelism_config_{kind}_size ({size}) must be 1: every process reads whole rows; use tp_size, "
                f"dp_shard_size and dp_replicate_size, as in fsdp2_tp.yaml and hsdp.yaml."
            )
    replicate, shard, tensor = (_size(environment, kind) for kind in ("dp_replicate", "dp_shard", "tp"))
    world_size = int(environment.get("WORLD_SIZE", "1"))
    if shard * tensor > 1 and not asks_for_sharding(environment):
        raise UserError(
            f"parallelism_config_tp_size ({tensor}) and dp_shard_size ({shard}) need distributed_type FSDP; set it, "
            f"as in fsdp2_tp.yaml, where dp_shard_size may be 1."
        )
    if replicate * shard * tensor != world_size:
        raise UserError(
            f"dp_replicate_size x dp_shard_size x tp_size ({replicate} x {shard} x {tensor}) must be num_processes "
            f"({world_size}); set --parallelism_config_dp_shard_size {world_size // (replicate * tensor) or 1}."
        )
    if tensor > 1 and replicate > 1 and shard == 1:
        raise UserError(
            f"parallelism_config_dp_replicate_size ({replicate}) with tp_size ({tensor}) needs a dp_shard_size of 2 "
            f"or more; swap dp_replicate_size and dp_shard_size."
        )


def _check_alone(environment: Mapping[str, str]) -> None:
    """A process without a rank must have been started alone."""
    for name in _COUNTS:
        if int(environment.get(name, "1")) > 1:
            raise UserError(
                f"{name} ({environment[name]}) processes were started that would each train alone; start one per "
                f"machine, which is accelerate launch, as in docs/examples/pretrain.slurm."
            )
    # accelerate launch names a meeting point where it is asked for several processes, and may still start one
    if "MASTER_ADDR" in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        raise UserError(
            "accelerate launch was asked for several processes (MASTER_ADDR is set) and started one that would train "
            "alone; use --config_file accelerate_configs/ddp.yaml, or cpu_2_processes.yaml, without --cpu."
        )
