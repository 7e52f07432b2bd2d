"""What a checkpoint is made of: named tensors of a model and its optimizers, there and back; whether they are sound.

One that is not must never take the place of one that is.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2x.checkpoints.format import TrainerState, list_checkpoints
from gpt2x.distributed.sharding import state_in_shards
from gpt2x.errors import UserError
from gpt2x.runs.layout import step_of

NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class State:
    """What a checkpoint is made of.

    Attributes:
        model: the weights by name, of the whole model.
        optimizer: tensors of the optimizer's state by name.
        trainer: what else a resumed run needs, as JSON; its ``step`` names the checkpoint.
    """

    model: NamedTensors
    optimizer: NamedTensors
    trainer: TrainerState

    def tensors(self) -> NamedTensors:
        """All of them, under ``model:`` and ``optimizer:``."""
        yield from ((f"model:{name}", tensor) for name, tensor in self.model)
        yield from ((f"optimizer:{name}", tensor) for name, tensor in self.optimizer)


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The name of each parameter by its ``id``; a tied one has its first name."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def optimizer_tensors(optimizers: Iterable[Optimizer], names: Mapping[int, str]) -> dict[str, Tensor]:
    """The state of the optimizers, keyed ``parameter name/state name``: the very tensors, where they are.

    Args:
        optimizers: the optimizers, whose parameters are disjoint.
        names: the name of each parameter by its ``id``.
    """
    return {
        f"{names[id(parameter)]}/{key}": value.detach()
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizers: Iterable[Optimizer], names: Mapping[int, str], tensors: Mapping[str, Tensor]
) -> None:
    """Puts saved state back into freshly made optimizers.

    Raises:
        UserError: where the saved state belongs to other parameters.
    """
    saved: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, state_name = key.rpartition("/")
        saved[name][state_name] = tensor
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        missing = [names[id(parameter)] for parameter in parameters if names[id(parameter)] not in saved]
        if missing:
            raise UserError(
                f"the checkpoint has no optimizer state for {missing[0]}; resume with the recipe that made it."
            )
        state = {
            position: state_in_shards(parameter, saved.pop(names[id(parameter)]))
            for position, parameter in enumerate(parameters)
        }
        # torch places the state beside its parameter, except where an optimizer wants a step count on the host
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if saved:
        raise UserError(
            f"the checkpoint has optimizer state for {next(iter(saved))}, which this run does not train; "
            f"resume with the recipe that made it."
        )


def first_not_finite(tensors: NamedTensors) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where none does."""
    return next((name for name, tensor in tensors if tensor.is_floating_point() and not _is_finite(tensor)), None)


def _is_finite(tensor: Tensor) -> bool:
    # A sum reads every number once and copies none; it may overflow where none of them is infinite.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def not_saved(run_dir: Path, step: int, reason: str) -> str:
    """One line: why the state after a step is no checkpoint, and from where to go on, with what."""
    older = [checkpoint for checkpoint in list_checkpoints(run_dir) if step_of(checkpoint) < step]
    way_on = f"goes on from {older[-1]}" if older else "starts anew"
    return (
        f"{reason}; the state after step {step} is not saved, and no checkpoint was deleted: with a lower learning "
        f"rate (optimizer.learning_rate) and --resume the same command {way_on}."
    )
