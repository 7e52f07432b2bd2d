"""What a launcher has made of its configuration, told before torch is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from gpt2x.config import Recipe
from gpt2x.errors import UserError

# What srun and mpirun tell each of the processes they start.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How this process was started.

    Attributes:
        num_processes: processes of the run.
        local_world_size: those on this machine.
        is_main: whether this is the first of them.
        is_sharded: whether the configuration asks for FSDP2.
    """

    num_processes: int = 1
    local_world_size: int = 1
    is_main: bool = True
    is_sharded: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Launch":
        """What torchrun and accelerate launch have left in a process's environment."""
        return cls(
            num_processes=int(environment.get("WORLD_SIZE", "1")),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
            is_main=environment.get("RANK", "0") == "0",
            is_sharded=environment.get("ACCELERATE_USE_FSDP") == "true",
        )


def check_launch(recipe: Recipe, environment: Mapping[str, str]) -> None:
    """Refuses what would run, but not as it was meant.

    Args:
        recipe: what is to be run.
        environment: of this process, as the launcher left it.

    Raises:
        UserError: for several processes that do not know of each other; for what a configuration asks for and gpt2x
            does not do.
    """
    _check_ranks(environment)
    if environment.get("ACCELERATE_USE_FSDP") == "true" and environment.get("FSDP_VERSION") != "2":
        raise UserError("fsdp_version (1) must be 2; set it in the launch configuration, as in accelerate_configs/fsdp2.yaml.")
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _check_deepspeed(recipe, environment)


def _check_ranks(environment: Mapping[str, str]) -> None:
    if "RANK" in environment:
        return
    for name in _COUNTS:
        if int(environment.get(name, "1")) > 1:
            raise UserError(
                f"{environment[name]} processes were started ({name}) that would each train alone; start one per "
                f"machine, and let it be accelerate launch, as in docs/examples/pretrain.slurm."
            )
    # accelerate launch names a meeting point where it was asked for several processes, and starts one
    if "MASTER_ADDR" in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        raise UserError(
            "accelerate launch was asked for several processes (MASTER_ADDR is set) and started ones that would each "
            "train alone; give it --config_file accelerate_configs/ddp.yaml, on CPUs cpu_2_processes.yaml, and no --cpu."
        )
