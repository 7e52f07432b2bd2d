"""DeepSpeed's ZeRO of stage 2: gradients and AdamW's state in pieces on several devices, the weights whole on each.

accelerate's backward would step before anybody knows the norm of the gradient. Here the engine is asked part by part,
so that a step that is not finite is left out before the optimizer moves. Weights stay float32, and bfloat16 is
autocast's, as without DeepSpeed; so losses and checkpoints are those of one process.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2x.config import TrainingRecipe
from gpt2x.errors import UserError

# A deepspeed.DeepSpeedEngine, of a package that most do without.
Engine = Any
_STATE = ("exp_avg", "exp_avg_sq")


def uses_zero(accelerator: Accelerator) -> bool:
    """Whether the launch configuration asks for DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_zero(recipe: TrainingRecipe) -> None:
    """Raises UserError for what a recipe asks for and DeepSpeed cannot do."""
    if recipe.optimizer.name != "adamw":
        raise UserError(
            f"optimizer.name ({recipe.optimizer.name}) must be adamw under DeepSpeed, which cuts weights into flat "
            f"pieces, and the nearest orthogonal matrix of a piece is another one; use fsdp2.yaml."
        )
    if recipe.train.mixed_precision == "fp16":
        raise UserError("train.mixed_precision (fp16) must be bf16 or no under DeepSpeed; use fsdp2.yaml for fp16.")


def prepare_zero(
    accelerator: Accelerator, model: nn.Module, optimizers: Sequence[Optimizer], recipe: TrainingRecipe
) -> tuple[nn.Module, list[Optimizer]]:
    """The engine, and its optimizer as the rest of a run knows optimizers.

    Args:
        accelerator: of the run, without mixed precision.
        model: whole, on the CPU or the device.
        optimizers: AdamW alone, which the engine takes apart.
        recipe: precision, clipping, and the micro-batch, which DeepSpeed wants to know.
    """
    (adamw,) = optimizers
    groups = [{**group, "params": list(group["params"])} for group in adamw.param_groups]
    if recipe.train.mixed_precision == "bf16":
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        model.forward = autocast(model.forward)
    config = accelerator.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = recipe.train.micro_batch_size
    config["gradient_clipping"] = recipe.train.max_grad_norm or 0.0
    engine, _ = accelerator.prepare(model, adamw)
    return engine, [ZeroAdamW(engine, groups)]


def backward(accelerator: Accelerator, model: nn.Module, loss: Tensor, *, is_last: bool) -> None:
    """Adds up gradients; under DeepSpeed, too, without a step.

    Args:
        accelerator: of the run.
        model: as prepared.
        loss: of a micro-batch.
        is_last: whether it is the step's last, after which ranks exchange gradients.
    """
    if not uses_zero(accelerator):
        accelerator.backward(loss)
        return
    engine: Engine = model
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss, scale_wrt_gas=False)


def zero_grad_norm(engine: Engine) -> float:
    """Of the gradients of a step, over all processes; step scales them down."""
    norm = float(engine.optimizer.scaled_global_norm())
    return math.nan if norm < 0 else norm  # by which DeepSpeed says that it is not finite


class ZeroAdamW(Optimizer):
    """The optimizer inside an engine, in terms of the model's parameters.

    Its state is in pieces, and ``state`` empty, except after gather_state.
    """

    def __init__(self, engine: Engine, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self.engine = engine

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clips the gradients and moves the weights."""
        for inside, group in zip(self.engine.optimizer.param_groups, self.param_groups, strict=True):
            inside["lr"] = group["lr"]
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, of a step that is left out too."""
        inside = self.engine.optimizer
        for gradients in (inside.averaged_gradients, inside.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
        inside.micro_step_id = -1
        inside.zero_grad(set_to_none=set_to_none)

    def gather_state(self, *, is_writer: bool) -> None:
        """Fills ``state`` with whole tensors in host memory, on the writer; all processes must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self.state.clear()
        if not self.pieces():
            return
        self._link()
        for group, pieces in zip(self.param_groups, self.pieces(), strict=True):
            for parameter in group["params"]:
                whole = {name: safe_get_full_optimizer_state(parameter, name) for name in _STATE}
                if is_writer:
                    on_host = {name: tensor.to("cpu", copy=True) for name, tensor in whole.items()}
                    self.state[parameter] = {"step": pieces["step"].to("cpu", copy=True), **on_host}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts whole state, by the position of each parameter, into the pieces."""
        from deepspeed.utils import safe_set_full_optimizer_state

        saved = iter(state_dict["state"].values())
        by_group = [[next(saved) for _ in group["params"]] for group in self.param_groups]
        inside = self.engine.optimizer
        for group, states in zip(inside.param_groups, by_group, strict=True):
            (flat,) = group["params"]
            step = states[0]["step"].to(device=flat.device, dtype=torch.float32, copy=True)
            inside.optimizer.state[flat] = {"step": step, **{name: torch.zeros_like(flat) for name in _STATE}}
        self._link()
        for group, states in zip(self.param_groups, by_group, strict=True):
            for parameter, state in zip(group["params"], states, strict=True):
                for name in _STATE:
                    safe_set_full_optimizer_state(parameter, state[name].to(parameter.device), name)

    def pieces(self) -> list[dict[str, Tensor]]:
        """This process's flat piece of each group's state; none before the first step."""
        inside = self.engine.optimizer
        state = inside.optimizer.state
        return [state[flat] for group in inside.param_groups for flat in group["params"] if flat in state]

    def _link(self) -> None:
        """Tells DeepSpeed's parameters where their state is; its own way forgets all groups but the first."""
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()
