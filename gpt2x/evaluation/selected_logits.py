"""Logits of chosen tokens, some at a time, from any causal language model of transformers.

Logits of a large vocabulary fill memory that is asked of the system at every pass. Some rows of them stay in the
processor's caches until the softmax has read them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from gpt2x.errors import UserError


class _Selection:
    """The tokens whose logits a pass is to give: the first time with the model's layers, then with its head only."""

    def __init__(self, places_N: Tensor, at_a_time: int) -> None:
        self.places_N, self.at_a_time = places_N, at_a_time
        self.output: ModelOutput | None = None
        self.hidden: deque[Tensor] = deque()

    def output_of(self, layers: Callable[..., ModelOutput], *args: Any, **kwargs: Any) -> ModelOutput:
        """In place of the layers' forward pass: the hidden states (1, at_a_time, C) of the next tokens."""
        if self.output is None:
            self.output = layers(*args, **kwargs)
            hidden_NC = self.output.last_hidden_state.flatten(0, 1).index_select(0, self.places_N)
            self.hidden.extend(hidden_NC.split(self.at_a_time))
        self.output.last_hidden_state = self.hidden.popleft()[None]
        return self.output


_selection: ContextVar[_Selection] = ContextVar("_selection")


@contextmanager
def selective_head(model: nn.Module) -> Iterator[None]:
    """The model's head gets the hidden states that `selected_logits` asks for; the model is then as it was before.

    Raises:
        UserError: if the model has no module of its layers without the head.
    """
    causal = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    layers: nn.Module = causal.base_model
    if layers is causal:
        raise UserError(
            f"{type(causal).__name__} has no module of its layers without the head; score it by lm-eval "
            "(scripts/run_lm_eval.py)."
        )
    before = layers.__dict__.get("forward")
    forward = layers.forward
    layers.forward = lambda *args, **kwargs: _selection.get().output_of(forward, *args, **kwargs)
    try:
        yield
    finally:
        del layers.__dict__["forward"]
        if before is not None:
            layers.forward = before


def selected_logits(
    model: nn.Module, inputs: Mapping[str, Any], places_N: Tensor, *, at_a_time: int | None
) -> Iterator[Tensor]:
    """The logits (at_a_time, V) of these of the B * T tokens of the inputs, the last fewer; under `selective_head`.

    Each is a forward pass, of the layers for the first only; None for all at once.
    """
    at_a_time = at_a_time or len(places_N)
    selection = _Selection(places_N, at_a_time)
    for _ in range(0, len(places_N), at_a_time):
        before = _selection.set(selection)
        logits = model(**inputs, use_cache=False).logits[0]
        _selection.reset(before)
        yield logits
