"""Tensor parallelism: the matrices of a layer are cut across a few devices, each of which computes with its part.

What is cut, and how, is the model's plan (``tp_plan``) in transformers' styles; FSDP2 shards the parts further across
the groups. What no style cuts (norms, learned positions) each device of a group has, and moves alike: all of them read
the same rows and see the same activations.
"""

import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, ParallelismConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

from gpt2x.errors import UserError

# The first of transformers in whose styles a tied embedding is cut.
_OLDEST = (5, 23)
# transformers sums these gradients whenever they are added to, the sums of earlier micro-batches included.
_SUMMED_GRADIENTS = "replicated_with_grad_allreduce"


class TensorParallelism(ParallelismConfig):
    """The sizes of the launch configuration, of tensor parallelism that is done before accelerate prepares the model.

    accelerate would prepare it once more, with a class that transformers 5 does not have, and refuses FSDP2 on groups
    that one device makes up alone.
    """

    @property
    def tp_enabled(self) -> bool:
        """False: nothing is left to be prepared."""
        return False

    @property
    def dp_shard_enabled(self) -> bool:
        """True: FSDP2 has its dimension of the mesh, of size 1 too."""
        return True

    @property
    def non_dp_dim_names(self) -> list[str]:
        """The dimension of the mesh whose processes read the same rows."""
        return ["tp"]


def is_tensor_parallel(accelerator: Accelerator) -> bool:
    """Whether the launch configuration asks for it."""
    return isinstance(accelerator.parallelism_config, TensorParallelism)


def cut_weights(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Leaves of each weight this device's part, where the launch configuration asks for it; optimizers come after.

    Args:
        model: whole, and the same on every process.
        accelerator: of the run.

    Raises:
        UserError: where the heads cannot be shared evenly, or the model has no plan.
    """
    if not is_tensor_parallel(accelerator):
        return
    mesh = accelerator.torch_device_mesh["tp"]
    check_version(transformers.__version__)
    check_sizes(model.config.to_dict(), mesh.size())
    plan = dict(_applied(model, model.tp_plan))
    if not plan:
        raise UserError(
            f"parallelism_config_tp_size ({mesh.size()}) needs a model that says how it is cut, and "
            f"{type(model).__name__} does not; use fsdp2.yaml."
        )
    _untie(model)
    for module, style in plan.items():
        _cut(module, style, mesh)
    model.tie_weights()
    _hush()


def check_version(version: str) -> None:
    """Raises UserError where transformers is too old."""
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise UserError(
            f"transformers ({version}) must be at least {_OLDEST[0]}.{_OLDEST[1]} for tensor parallelism; upgrade it, "
            f"or shard by FSDP2 alone, as in fsdp2.yaml."
        )


def check_sizes(config: Mapping[str, Any], size: int) -> None:
    """Raises UserError where heads cannot be shared evenly among ``size`` devices; all else may be cut unevenly."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        if config.get(name, size) % size:
            raise UserError(
                f"parallelism_config_tp_size ({size}) must divide {name} ({config[name]}); use fewer devices per "
                f"group, or shard by FSDP2 alone, as in fsdp2.yaml."
            )


def _applied(model: nn.Module, plan: Mapping[str, str]) -> Iterable[tuple[nn.Module, str]]:
    for name, module in model.named_modules():
        style = plan.get(replace_layer_number_by_wildcard(name))
        if style is not None:
            yield module, style


def _untie(model: PreTrainedModel) -> None:
    """Gives a tied head a parameter of its own, so that it is cut too; they are tied again by their parts."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach())


def _cut(module: nn.Module, style_name: str, mesh: DeviceMesh) -> None:
    if style_name == _SUMMED_GRADIENTS:
        _sum_gradients(module, mesh.get_group())
        return
    style = ALL_PARALLEL_STYLES[style_name]
    for name, _ in list(module.named_parameters(recurse=False)):
        style.shard_param(module, name, mesh)
    style.install_forward(module, mesh)


def _sum_gradients(module: nn.Module, group: dist.ProcessGroup) -> None:
    """For weights that every device has and applies to its own heads: their gradient is the sum over the devices."""
    forward: Callable[..., Any] = module.forward

    def summing_forward(*arguments: Any, **options: Any) -> Any:
        parameters = dict(module._parameters)
        module._parameters.update(
            {name: _SumGradients.apply(weight, group) for name, weight in parameters.items() if weight is not None}
        )
        try:
            return forward(*arguments, **options)
        finally:
            module._parameters.update(parameters)

    module.forward = summing_forward


class _SumGradients(torch.autograd.Function):
    """The same tensor forwards, the sum over the processes of its gradients backwards."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def separate_meshes(optimizers: Iterable[Optimizer]) -> None:
    """Splits groups whose parameters lie on different meshes, which torch's fused steps do not take together."""
    for optimizer in optimizers:
        optimizer.param_groups[:] = [part for group in optimizer.param_groups for part in _by_mesh(group)]


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    parameters: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
    for parameter in group["params"]:
        parameters[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return [{**group, "params": those} for those in parameters.values()]


def _hush() -> None:
    """Silences what torch says of every such model: nothing here changes an output in place, or gathers often."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
