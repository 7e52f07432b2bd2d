"""The cache's name, and a cache that grows in place.

transformers' dynamic cache copies all keys and values into a new tensor at every step, which with many rows takes
longer than reading the weights. Here they lie in a buffer with room for more, and a step writes its own only.
"""

from inspect import signature
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask

CACHE_NAMES = ("past_key_values", "cache")
# How this transformers calls the cache: by the newer name from 5.24 on.
CACHE_NAME = CACHE_NAMES["cache" in signature(create_causal_mask).parameters]
# A full buffer makes room for so many times its tokens: little memory is idle, and copying stays rare.
GROWTH = 1.25
MIN_ROOM = 64


def take_cache(past_key_values: Cache | None, kwargs: dict[str, Any]) -> Any:
    """The cache that a model's forward was given by either name; `cache` is taken out of `kwargs`.

    Before 5.24 transformers hands the paged cache of continuous batching past the model to the attention function, as
    `cache`: there it stays.

    Raises:
        ValueError: if both names are given.
    """
    cache = kwargs.pop("cache", None)
    if cache is None:
        return past_key_values
    if CACHE_NAME != "cache" and not isinstance(cache, Cache):
        kwargs["cache"] = cache
        return past_key_values
    if past_key_values is not None:
        raise ValueError("past_key_values and cache are two names of one argument; give one of them.")
    return cache


class GrowingLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are views of buffers with room behind them, (B, H, S + room, D).

    Whatever else is done to `keys` and `values` (cropping, reordering, repeating rows) is seen by where they lie:
    a view that still begins where the buffer does is written behind; anything else is copied into a new buffer.
    Where tensors lie is nothing that a compiler or exporter can trace: for them it is a DynamicLayer.
    """

    # Exporters make an input of every tensor they find in `vars`.
    __slots__ = ("_buffers",)

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[torch.Tensor] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are DynamicLayers, with tensors of their own and no room."""
        state = dict(vars(self))
        if self.is_initialized:
            whole = {"memory_format": torch.contiguous_format}
            state.update(keys=self.keys.clone(**whole), values=self.values.clone(**whole))
        return DynamicLayer, (), state

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (B, H, T, D) keys and values and returns all of them, (B, H, S + T, D)."""
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]  # type: ignore[misc]
        past, total = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self._has_room(total):
            room = max(total + MIN_ROOM, int(total * GROWTH))
            self._buffers = [_with_room(old, room) for old in (self.keys, self.values)]
        for buffer, new in zip(self._buffers, (key_states, value_states)):
            buffer[:, :, past:total] = new
        self.keys, self.values = (buffer[:, :, :total] for buffer in self._buffers)  # type: ignore[misc]
        return self.keys, self.values

    def _has_room(self, total: int) -> bool:
        views = zip(self._buffers, (self.keys, self.values))
        return bool(self._buffers) and all(
            view.data_ptr() == buffer.data_ptr() and view.shape[0] == buffer.shape[0] and total <= buffer.shape[-2]
            for buffer, view in views
        )


def _with_room(old: torch.Tensor, room: int) -> torch.Tensor:
    buffer = old.new_empty((*old.shape[:2], room, old.shape[-1]))
    buffer[:, :, : old.shape[-2]] = old
    return buffer


def grow_in_place(cache: Any) -> None:
    """Makes the plain layers of an empty DynamicCache growing ones; others, sliding ones say, stay as they are."""
    if type(cache) is DynamicCache and not cache.offloading:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]


__all__ = ["CACHE_NAME", "CACHE_NAMES", "GrowingLayer", "grow_in_place", "take_cache"]
