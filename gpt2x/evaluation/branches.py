"""Attention over questions that stand one after the other in a row, each a context and its continuations.

A token sees of its own question the context and its own continuation, up to itself: what it would see if every
continuation had a row of its own. Nothing is padded, and the context is there once.

    H  query heads    T  tokens of the row        R  continuations of the row
    K  key heads      D  width of one head        L  tokens of the longest context with its continuation
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from gpt2x.distributed.devices import on_device

# transformers makes no mask for an attention whose masks it does not know, so none is registered.
_NAME = "branches"
_current: ContextVar["_Branches"] = ContextVar("_current")
# Which tokens ask, which answer, and what is added to their scores.
_Block = tuple[slice, list[slice], Tensor]
# Continuations of a product on the CPU: fewer are smaller products, more are for nothing where one meets another.
_TOGETHER = 2


@dataclass(frozen=True, kw_only=True)
class Branching:
    """How many tokens the context of a question has, one at least, and each of its continuations."""

    context: int
    branches: Sequence[int]

    def __len__(self) -> int:
        return self.context + sum(self.branches)

    def positions(self) -> Tensor:
        """How many tokens of the context and of its own continuation stand before each token."""
        starts = [torch.arange(self.context)]
        return torch.cat(starts + [torch.arange(self.context, self.context + length) for length in self.branches])

    def hiding(self, window: int | None) -> Tensor:
        """What is added to the scores (T, T): 0 where a token sees another, else minus infinity."""
        hiding_TT = torch.full((len(self), len(self)), float("-inf")).triu_(1)
        for span in self.spans():
            hiding_TT[span.stop :, span] = float("-inf")
        if window is not None:
            positions_T = self.positions()
            hiding_TT.masked_fill_(positions_T[:, None] - positions_T >= window, float("-inf"))
        return hiding_TT

    def spans(self) -> list[slice]:
        """The places of the continuations."""
        return [slice(*ends) for ends in pairwise(accumulate(self.branches, initial=self.context))]


@contextmanager
def branching_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model attends by the branches of each pass (`branches_of_pass`), and afterwards as before."""
    AttentionInterface.register(_NAME, _attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def branches_of_pass(questions: Sequence[Branching], device: torch.device) -> Iterator[None]:
    """The row of the model's next forward pass, (1, T), consists of these questions."""
    token = _current.set(_Branches(questions, device))
    try:
        yield
    finally:
        _current.reset(token)


def _attention(
    module: nn.Module,
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTD: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: returns the output (1, T, H, D), and None for the weights."""
    branches = _current.get()
    is_exact = q_1HTD.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if q_1HTD.device.type == "cpu" and is_exact:
        return branches.attend_by_question(q_1HTD, k_1KTD, v_1KTD, sliding_window, kwargs.get("scaling")), None
    return branches.attend_in_rows(module, q_1HTD, k_1KTD, v_1KTD, sliding_window, kwargs), None


class _Branches:
    """The questions of one row, and the two ways to attend in it."""

    def __init__(self, questions: Sequence[Branching], device: torch.device) -> None:
        self.questions, self.device = questions, device
        self.starts = list(accumulate(map(len, questions), initial=0))
        self._blocks: dict[int | None, list[_Block]] = {}

    def attend_by_question(
        self, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        """For the CPU: plain products of a question's tokens, which its caches hold and which outrun its SDPA."""
        groups = q_1HTD.shape[1] // k_1KTD.shape[1]
        q_HTD, k_HTD, v_HTD = q_1HTD[0], repeat_kv(k_1KTD, groups)[0], repeat_kv(v_1KTD, groups)[0]
        scale = q_HTD.shape[-1] ** -0.5 if scale is None else scale
        out_THD = v_HTD.new_empty(q_HTD.shape[1], q_HTD.shape[0], v_HTD.shape[-1])
        if window not in self._blocks:
            self._blocks[window] = list(self.blocks(window))
        for queries, keys, hiding_TS in self._blocks[window]:
            k_HSD, v_HSD = _at(k_HTD, keys), _at(v_HTD, keys)
            scores_HTS = torch.baddbmm(hiding_TS, q_HTD[:, queries], k_HSD.mT, alpha=scale)
            out_THD[queries] = torch.bmm(scores_HTS.softmax(-1), v_HSD).transpose(0, 1)
        return out_THD[None]

    def blocks(self, window: int | None) -> Iterator[_Block]:
        """Of every question its continuations, some at a time since they do not see each other; first the context."""
        for question, start in zip(self.questions, self.starts, strict=False):
            context = slice(start, start + question.context)
            own = context
            for first in range(0, len(question.branches), _TOGETHER):
                part = replace(question, branches=question.branches[first : first + _TOGETHER])
                own = slice(own.stop, own.stop + sum(part.branches))
                if first == 0:
                    whole = slice(start, own.stop)
                    yield whole, [whole], part.hiding(window)
                else:
                    yield own, [context, own], part.hiding(window)[question.context :]

    def attend_in_rows(
        self,
        module: nn.Module,
        q_1HTD: Tensor,
        k_1KTD: Tensor,
        v_1KTD: Tensor,
        window: int | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """For other devices: SDPA's kernels for causal rows, one per continuation, in one call."""
        taken_RL, given_T = self.rows
        R, L = taken_RL.shape
        q_RHLD, k_RKLD, v_RKLD = (
            x[0].transpose(0, 1).index_select(0, taken_RL.flatten()).unflatten(0, (R, L)).transpose(1, 2)
            for x in (q_1HTD, k_1KTD, v_1KTD)
        )
        mask = None if window is None or window >= L else _band(L, window, self.device)
        out_RLHD, _ = sdpa_attention_forward(module, q_RHLD, k_RKLD, v_RKLD, mask, **kwargs)
        return out_RLHD.flatten(0, 1).index_select(0, given_T)[None]

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """(which token of the row stands at each place of the rows (R, L), at which of R * L places each token is)."""
        taken = []
        for question, start in zip(self.questions, self.starts, strict=False):
            places_T = torch.arange(start, start + len(question))
            taken += [torch.cat([places_T[: question.context], places_T[span]]) for span in question.spans()]
        taken_RL = pad_sequence(taken, batch_first=True)
        given_T = torch.empty(self.starts[-1], dtype=torch.long)
        for row, tokens in enumerate(taken):
            given_T[tokens] = row * taken_RL.shape[1] + torch.arange(len(tokens))
        there = on_device({"taken": taken_RL, "given": given_T}, self.device)
        return there["taken"], there["given"]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """(1, 1, L, L), true where a token sees another of its window."""
    sees_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return sees_LL.triu(1 - window)[None, None]


def _at(x_HTD: Tensor, places: list[slice]) -> Tensor:
    parts = [x_HTD[:, place] for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
