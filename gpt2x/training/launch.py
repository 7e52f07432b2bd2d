"""What a launcher has made of its configuration, told before torch is imported."""

from collections.abc import Mapping

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
    if asks_for_sharding(environment) and environment.get("FSDP_VERSION", "1") != "2":
        raise UserError("fsdp_version (1) must be 2; set it in the launch configuration, as in fsdp2.yaml.")
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "distributed_type (DEEPSPEED) is none of gpt2x's, whose every step must be able to be left out before "
            "the optimizer moves; fsdp2.yaml shards the same weights, gradients and state."
        )
    for kind in ("TP", "CP", "SP"):
        size = environment.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")
        if size != "1":
            raise UserError(
                f"parallelism_config_{kind.lower()}_size ({size}) must be 1: every process reads its own rows; "
                f"use dp_shard_size and dp_replicate_size, as in hsdp.yaml."
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
