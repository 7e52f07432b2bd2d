"""Optimizers: AdamW with decay groups, Muon for the matrices of the layers, and the scale of their fp16 gradients."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from gpt2x.config import OptimizerSection
from gpt2x.distributed.sharding import in_shards_like, whole_matrices


def make_optimizers(
    model: PreTrainedModel, section: OptimizerSection, *, mixed_precision: str = "bf16"
) -> list[Optimizer]:
    """The optimizers of a recipe, every trainable parameter in exactly one of them.

    Args:
        model: any causal language model of transformers.
        section: which optimizer, and its hyper-parameters.
        mixed_precision: of the recipe, which Muon's matrix products follow: float32 with ``no``, else bfloat16.

    Returns:
        AdamW alone, or Muon and the AdamW for what Muon does not take. Each group carries its peak learning rate as
        ``peak_lr``, from which the loop sets ``lr``.
    """
    matrices, embeddings, vectors = split_parameters(model)
    adamw: dict[str, Any] = {
        "lr": section.learning_rate,
        "betas": (section.adam_beta1, section.adam_beta2),
        "eps": section.adam_epsilon,
        "fused": True,
    }
    undecayed = {"params": vectors, "weight_decay": 0.0}
    if section.name == "adamw":
        decayed = {"params": matrices + embeddings, "weight_decay": section.weight_decay}
        optimizers: list[Optimizer] = [AdamW(_filled(decayed, undecayed), **adamw)]
    else:
        undecayed["params"] = embeddings + vectors
        optimizers = [
            Muon(
                matrices,
                lr=section.muon_learning_rate,
                momentum=section.muon_momentum,
                weight_decay=section.weight_decay,
                ns_dtype=torch.float32 if mixed_precision == "no" else torch.bfloat16,
            ),
            AdamW(_filled(undecayed), **adamw),
        ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def split_parameters(model: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as (matrices of the layers, embeddings and head, vectors); a tied one counts once."""
    head = model.get_output_embeddings()
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is head
        for parameter in module.parameters()
    }
    matrices: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        kind = vectors if parameter.ndim < 2 else embeddings if id(parameter) in tables else matrices
        kind.append(parameter)
    return matrices, embeddings, vectors


def _filled(*groups: dict) -> list[dict]:
    return [group for group in groups if group["params"]]


def set_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Sets every group to ``factor`` times its peak."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak_lr"] * factor


class Muon(Optimizer):
    """Momentum orthogonalized by Newton-Schulz (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Matrices of one shape are orthogonalized as one batch, so a step costs a few batched products instead of several
    small ones per matrix. Those that lie in shards are put together for it on every device, whose work and memory for
    it are those of a device alone.

    Args:
        params: matrices.
        lr: learning rate; an update has a root mean square of about ``lr`` times 1 / sqrt(columns).
        momentum: of the Nesterov momentum.
        weight_decay: decoupled; a step shrinks a weight by ``lr * weight_decay``.
        ns_dtype: of the Newton-Schulz iterations. bfloat16 makes some thousandths of an update out of the last bits
            of a gradient, in which sums over several devices differ; float32 some hundred-thousandths.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_dtype": ns_dtype})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict) -> None:
        momentum, lr = group["momentum"], group["lr"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self._buffer(parameter) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, buffers, momentum)
        # of a shard alone the nearest orthogonal matrix would be another one
        orthogonal = orthogonalize(torch.stack(whole_matrices(nesterov)), dtype=group["ns_dtype"])
        updates = in_shards_like(parameters, orthogonal.unbind())
        rows, columns = parameters[0].shape
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-lr * max(1, rows / columns) ** 0.5)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


# The quintic's coefficients maximize the slope at zero; singular values end in about [0.7, 1.2] (Jordan et al. 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices_NRC: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest semi-orthogonal matrices, approximately, by a quintic Newton-Schulz iteration.

    Args:
        matrices_NRC: a batch of matrices, float32.
        steps: iterations.
        dtype: of the iterations.

    Returns:
        A batch of the same shape and type whose singular values lie around 1.
    """
    a, b, c = _QUINTIC
    x_NRC = matrices_NRC.to(dtype)
    tall = x_NRC.size(-2) > x_NRC.size(-1)
    if tall:  # the Gram matrix is built on the shorter side
        x_NRC = x_NRC.mT
    x_NRC = x_NRC / (x_NRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x_NRC, beta=a)
    return (x_NRC.mT if tall else x_NRC).to(matrices_NRC.dtype)


# --- scaled gradients (fp16) under several optimizers: one decision and one change of the scale per step -------------
#
# accelerate's wrapper of an optimizer changes the scale itself: of Muon and its AdamW the second would divide
# gradients by the scale once more, leave its step out or not without regard to the first, and count every step twice.

# Gradients that overflow without being scaled up would overflow at any scale (Megatron-LM stops there as well).
MIN_SCALE = 1.0


def settle_scale(scaler: GradScaler, *, is_kept: bool) -> None:
    """Ends a step whose gradients have been unscaled: lowers the scale where one was not finite, else counts it.

    Args:
        scaler: of the accelerator, whose clipping has unscaled the gradients of all optimizers.
        is_kept: whether the scale stays as it is, of a step that the scale has nothing to do with.
    """
    before = scaler.state_dict() if is_kept else None
    scaler.update()  # in any case, since it forgets that the gradients are unscaled
    if before is not None:
        scaler.load_state_dict(before)


def without_scaler(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper where that has a scaler, else the one that was given."""
    if isinstance(optimizer, AcceleratedOptimizer) and optimizer.scaler is not None:
        return optimizer.optimizer
    return optimizer
