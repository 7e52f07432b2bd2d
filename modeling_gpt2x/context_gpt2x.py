"""What a token sees: masks for its past, its window and its own document; and the cache of the passes before.

Shapes: B batch, T positions of this forward pass, S positions seen with the cache included, H heads, D their width.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, masking_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

CACHE_NAMES = ("past_key_values", "cache")
# How this transformers calls the cache: by the newer name from 5.24 on.
CACHE_NAME = CACHE_NAMES["cache" in signature(masking_utils.create_causal_mask).parameters]
# A full buffer makes room for so many times its tokens: little memory is idle, and copying stays rare.
GROWTH = 1.25
MIN_ROOM = 64


def make_attention_masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
) -> dict[str, Any]:
    """One mask per layer type, in the form the attention implementation wants; `None` is plainly causal.

    `cache` and `position_ids` must be the caller's own, before any default is filled in. Positions that restart within
    a row are packed documents which must not see each other, with or without an attention_mask or a cache. Where the
    caller gives none of the three nothing is looked at: plain batches need no mask and compile into one graph.

    Args:
        config: of the model.
        inputs_embeds: (B, T, C).
        attention_mask: (B, S), 1 for tokens and 0 for padding; masks already made are returned as they are.
        cache: the keys and values before this pass.
        position_ids: (B, T) or (1, T).
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    mask_kwargs = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        CACHE_NAME: cache,
    }
    interface = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if interface is masking_utils.flash_attention_mask:
        mask_kwargs["position_ids"] = position_ids  # flash attention finds the documents by itself
    elif interface is not None:
        mask_kwargs["and_mask_function"] = _same_document(inputs_embeds, attention_mask, cache, position_ids)
    is_plain = position_ids is None and attention_mask is None and cache is None
    masks = {}
    for layer_type in sorted(set(config.layer_types)):
        window = config.sliding_window if layer_type == "sliding_attention" else None
        fits_window = window is None or inputs_embeds.shape[1] <= window
        # transformers skips the mask in this case too, but not while compiling.
        skips_mask = is_plain and fits_window and interface is masking_utils.sdpa_mask
        make = masking_utils.create_causal_mask if window is None else masking_utils.create_sliding_window_causal_mask
        masks[layer_type] = None if skips_mask else make(**mask_kwargs)
    return masks


def _same_document(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
) -> Callable | None:
    """The mask function that keeps packed documents apart; `None` if no row holds more than one.

    While compiling nothing can be decided by what is in a tensor, so positions then always make a mask. Only a cache
    under the compiler leaves documents unseparated: whoever compiles decoding packs no documents.
    """
    is_compiling = torch.compiler.is_compiling()
    is_made = attention_mask is not None and attention_mask.ndim != 2
    if position_ids is None or is_made or (is_compiling and cache is not None):
        return None
    B, T = inputs_embeds.shape[:2]
    num_past = 0 if cache is None else int(cache.get_seq_length())
    is_token_BS = torch.ones((B, num_past + T), dtype=torch.bool, device=inputs_embeds.device)
    if attention_mask is not None:
        missing = max(0, num_past + T - attention_mask.shape[1])
        is_token_BS = F.pad(attention_mask.to(inputs_embeds.device).bool(), (0, missing))[:, : num_past + T]
    start_BT, rank_BS = document_starts(position_ids.expand(B, -1), is_token_BS)
    if not is_compiling and not (start_BT > 0).any():
        return None

    def sees_own_document(b: Any, h: Any, q: Any, kv: Any) -> Any:
        # A static cache has room behind the positions seen; nothing there is visible anyway.
        return rank_BS[b, kv.clamp(max=num_past + T - 1)] >= start_BT[b, q - num_past]

    return sees_own_document


def document_starts(position_BT: torch.Tensor, is_token_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the document of each of the last T positions begins, counted in tokens without padding.

    A document begins where a position does not follow the one of the token before it; padding between two tokens may
    or may not have been counted. At position p it also began at most p tokens ago, which tells how much of a cache
    belongs to it. Returns the number of tokens before each position's document, and that before each position.
    """
    T, S = position_BT.shape[1], is_token_BS.shape[1]
    rank_BS = is_token_BS.cumsum(-1) - is_token_BS.long()
    rank_BT, is_token_BT = rank_BS[:, S - T :], is_token_BS[:, S - T :]
    index_T = torch.arange(T, device=position_BT.device)
    # The index of the last token up to and including each position, then of the last one before it.
    last_BT = torch.where(is_token_BT, index_T, -1).cummax(-1).values
    previous_BT = F.pad(last_BT[:, :-1], (1, 0), value=-1)
    step_BT = position_BT - position_BT.gather(1, previous_BT.clamp(min=0))
    follows_BT = (step_BT >= 1) & (step_BT <= index_T - previous_BT)
    breaks_BT = is_token_BT & (previous_BT >= 0) & ~follows_BT
    start_BT = torch.where(breaks_BT, rank_BT, 0).cummax(-1).values
    return torch.where(is_token_BT, torch.maximum(start_BT, rank_BT - position_BT), 0), rank_BS


# --------------------------------------------------------------------------------------------------------- cache
def take_cache(past_key_values: Cache | None, kwargs: dict[str, Any]) -> Any:
    """The cache that a model's forward was given by either name; `cache` is taken out of `kwargs`.

    Before 5.24 transformers calls `cache` the paged one that goes past the model to the attention function: it stays.

    Raises:
        ValueError: if both names are given.
    """
    is_paged = CACHE_NAME != "cache" and not isinstance(kwargs.get("cache"), Cache)
    cache = None if is_paged else kwargs.pop("cache", None)
    if cache is not None and past_key_values is not None:
        raise ValueError("past_key_values and cache are two names of one argument; give one of them.")
    return past_key_values if cache is None else cache


class GrowingLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are views of buffers with room behind them, (B, H, S + room, D).

    Whatever else is done to `keys` and `values` (cropping, reordering, repeating rows) is seen by where they lie: a
    view that still begins where the buffer does is written behind; anything else is copied into a new buffer. A
    compiler or exporter cannot trace where tensors lie: for them it is a DynamicLayer.
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
            self._buffers = [F.pad(old, (0, 0, 0, room - past)) for old in (self.keys, self.values)]
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


def grow_in_place(cache: Any) -> None:
    """Makes the plain layers of an empty DynamicCache growing ones; others, sliding ones say, stay as they are."""
    if type(cache) is DynamicCache and not cache.offloading:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
