"""The accelerator that a process computes on: chosen, prepared, described, and what is not the same on all of them."""

import ctypes
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    set_seed,
    str_to_bool,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.optim import Optimizer

from gpt2x import __version__
from gpt2x.config import TrainingRecipe
from gpt2x.distributed.launch import asks_for_sharding, usable_cores
from gpt2x.distributed.ranks import data_rank
from gpt2x.distributed.tensor_parallel import TensorParallelism, separate_meshes
from gpt2x.errors import UserError

# malloc.h: M_MMAP_MAX, no separate mapping for large blocks; M_TRIM_THRESHOLD and M_TOP_PAD, in bytes.
_GLIBC_OPTIONS = {-4: 0, -1: 2**31 - 1, -2: 2**28}

# Dense bfloat16 peaks in FLOP/s, from the vendors' data sheets.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "B200": 2250e12,
}

_FSDP_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_device(environment: Mapping[str, str]) -> torch.device:
    """The accelerator that torch finds; the CPU where it finds none, or a launcher asks for it (``use_cpu: true``).

    Args:
        environment: of this process, as the launcher left it.
    """
    if str_to_bool(environment.get("ACCELERATE_USE_CPU", "false")):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def make_accelerator(recipe: TrainingRecipe, environment: Mapping[str, str]) -> Accelerator:
    """The accelerator of a run, its threads set and its random numbers seeded.

    Args:
        recipe: precision, trackers, threads and seed.
        environment: of this process, as the launcher left it: what the launch configuration asks for, and how many
            processes share this machine's cores.

    Raises:
        UserError: for fp16, or shards in host memory, without a GPU.
    """
    on_cpu = compute_device(environment).type == "cpu"
    is_sharded = asks_for_sharding(environment)
    if on_cpu and recipe.train.mixed_precision == "fp16":
        raise UserError("train.mixed_precision (fp16) needs a GPU, and this run is on the CPU; use bf16 or no.")
    if on_cpu:
        # accelerate launch sets OMP_NUM_THREADS=1 on a machine without a GPU
        torch.set_num_threads(recipe.train.num_threads or usable_cores(int(environment.get("LOCAL_WORLD_SIZE", "1"))))
        torch.set_flush_denormal(True)
        keep_freed_memory()
    plugin = make_fsdp_plugin(recipe.train.mixed_precision) if is_sharded else None
    if on_cpu and plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("fsdp_offload_params (true) needs a GPU, and this run is on the CPU; set it to false.")
    if on_cpu and is_sharded:
        let_accelerate_shard_on_cpu()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=recipe.train.mixed_precision,
        fsdp_plugin=plugin,
        # What a launch configuration says of these is the recipe's to decide; see launch.passed_over.
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Both read the sizes of the launch configuration; where this is None, accelerate does.
        parallelism_config=TensorParallelism() if is_sharded and ParallelismConfig().tp_size > 1 else None,
        log_with=recipe.run.report_to or None,
        project_dir=recipe.run.dir,
    )
    set_seed(recipe.run.seed)
    return accelerator


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizers: Sequence[Optimizer]
) -> tuple[nn.Module, list[Optimizer]]:
    """The model and its optimizers as the launch configuration has them."""
    prepared, *prepared_optimizers = accelerator.prepare(model, *optimizers)
    separate_meshes(prepared_optimizers)
    return prepared, prepared_optimizers


def let_accelerate_shard_on_cpu() -> None:
    """Makes accelerate's FSDP2 work on processes that talk by gloo, as it does on GPUs.

    The type of the processes is all that it asks before it turns them on; nothing of what follows needs a GPU.
    """
    state = PartialState(cpu=True)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def make_fsdp_plugin(mixed_precision: str) -> FullyShardedDataParallelPlugin:
    """FSDP2 as the launch configuration has it, in the recipe's precision.

    accelerate's own policy would add gradients up in bfloat16 and round the loss to it.
    """
    policy = MixedPrecisionPolicy(param_dtype=_FSDP_DTYPES[mixed_precision], reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=policy)


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees, since the next step wants the same: fresh pages cost a tenth of a step."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in _GLIBC_OPTIONS.items():
            libc.mallopt(option, value)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of the device; None where its data sheet is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAK_FLOPS.items() if model in name), None)


def environment_of(accelerator: Accelerator) -> dict[str, str | int]:
    """What decides, beside the recipe, in which order a run adds numbers up, and so the last bits of its weights.

    On a CPU the same environment gives the same bits. A GPU's kernels may add in another order each time.
    """
    device = accelerator.device
    facts: dict[str, str | int] = {
        "processes": accelerator.num_processes,
        "distribution": accelerator.distributed_type.value,
        "tensor parallel": data_rank(accelerator).num_copies,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpt2x": __version__,
    }
    return facts | ({"threads": torch.get_num_threads(), "processor": _processor()} if device.type == "cpu" else {})


def _processor() -> str:
    """Its name, and the widest instructions that torch's kernels use of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {torch.backends.cpu.get_cpu_capability()}"


def describe_changes(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """A line where a run goes on in another environment than a checkpoint was made in.

    Args:
        before: the checkpoint's; None where it is from before environments were kept, and nothing is known.
        now: this process's.
    """
    known = before or {}
    changes = [f"{name} {now[name]} (was {known[name]})" for name in now if known.get(name, now[name]) != now[name]]
    return [f"resumed with {', '.join(changes)}: equal to rounding, not bit for bit."] if changes else []


def describe_device(accelerator: Accelerator) -> str:
    """The hardware in words: how many of what, with how many threads."""
    if accelerator.device.type == "cuda":
        what = torch.cuda.get_device_name(accelerator.device)
    else:
        what = f"{accelerator.device.type} with {torch.get_num_threads()} threads"
    return f"{accelerator.num_processes} x {what}"


# --- what differs between accelerators ------------------------------------------------------------------------------


def on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies a batch there; CUDA goes on meanwhile, where others may still read what is no longer there (Apple's)."""
    return map_distinct(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"), tensors)


def map_distinct(function: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a function makes of each; a tensor that has two names, as ids and labels are one, goes through it once."""
    distinct = {id(tensor): tensor for tensor in tensors.values()}
    made = {key: function(tensor) for key, tensor in distinct.items()}
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Attention by torch's other kernels, where the number of keys changes all the time.

    cuDNN, the first choice on Hopper, plans anew for every number, which takes longer than the rest of a token.
    Training has one length and keeps it.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Leaves the random state of the CPU and of one device as it was; other devices may be other people's."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        yield
