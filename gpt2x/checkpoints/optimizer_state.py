"""The state of optimizers as named tensors, as a checkpoint holds it, and back."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2x.distributed.sharding import state_in_shards
from gpt2x.errors import UserError


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
