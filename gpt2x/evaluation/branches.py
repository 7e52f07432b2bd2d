"""Attention over questions that stand one after the other in a row, each a context and its continuations.

A token sees of its own question the context and its own continuation, up to itself: what it would see if every
continuation had a row of its own. Nothing is padded, and the context is there once.

    H  query heads    T  tokens of the row        R  continuations of the row
    K  key heads      D  width of one head        L  tokens of the longest context with its continuation
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

# transformers makes no mask for an attention whose masks it does not know, so none is registered.
_NAME = "branches"
_current: ContextVar["_Branches"] = ContextVar("_current")


@dataclass(frozen=True, kw_only=True)
class Branching:
    """The tokens of one question.

    Attributes:
        positions: how many tokens of the context and of its own continuation stand before each token.
        branches: 0 in the context, 1 and up in the continuations.
    """

    positions: Sequence[int]
    branches: Sequence[int]


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
        return branches.attend_by_question(module, q_1HTD, k_1KTD, v_1KTD, sliding_window, kwargs.get("scaling")), None
    return branches.attend_in_rows(module, q_1HTD, k_1KTD, v_1KTD, sliding_window, kwargs), None


class _Branches:
    """The questions of one row, and the two ways to attend in it."""

    def __init__(self, questions: Sequence[Branching], device: torch.device) -> None:
        self.questions, self.device = questions, device
        ends = accumulate((len(question.positions) for question in questions), initial=0)
        self.spans = [slice(start, stop) for start, stop in pairwise(ends)]
        self._hiding: dict[int | None, list[Tensor]] = {}

    def attend_by_question(
        self,
        module: nn.Module,
        q_1HTD: Tensor,
        k_1KTD: Tensor,
        v_1KTD: Tensor,
        window: int | None,
        scale: float | None,
    ) -> Tensor:
        """For the CPU: plain products of a question's tokens, which its caches hold and which outrun its SDPA."""
        groups = q_1HTD.shape[1] // k_1KTD.shape[1]
        q_HTD, k_HTD, v_HTD = q_1HTD[0], repeat_kv(k_1KTD, groups)[0], repeat_kv(v_1KTD, groups)[0]
        scale = q_HTD.shape[-1] ** -0.5 if scale is None else scale
        out_THD = v_HTD.new_empty(q_HTD.shape[1], q_HTD.shape[0], v_HTD.shape[-1])
        for span, hiding_TT in zip(self.spans, self.hiding(window), strict=True):
            scores_HTT = torch.baddbmm(hiding_TT, q_HTD[:, span], k_HTD[:, span].mT, alpha=scale)
            out_THD[span] = torch.bmm(scores_HTT.softmax(-1), v_HTD[:, span]).transpose(0, 1)
        return out_THD[None]

    def hiding(self, window: int | None) -> list[Tensor]:
        """What is added to the scores of each question: 0 where a token sees another, else minus infinity."""
        if window in self._hiding:
            return self._hiding[window]
        added = self._hiding[window] = []
        for question in self.questions:
            branches_T, positions_T = torch.tensor(question.branches), torch.tensor(question.positions)
            sees_TT = (branches_T == 0) | (branches_T == branches_T[:, None])
            sees_TT &= sees_TT.new_ones(sees_TT.shape).tril()
            if window is not None:
                sees_TT &= positions_T[:, None] - positions_T < window
            added.append(torch.zeros(sees_TT.shape).masked_fill(~sees_TT, float("-inf")))
        return added

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
        for question, span in zip(self.questions, self.spans, strict=True):
            branches_T = torch.tensor(question.branches)
            for number in range(1, max(1, *question.branches) + 1):
                taken.append(span.start + torch.nonzero((branches_T == 0) | (branches_T == number)).flatten())
        taken_RL = pad_sequence(taken, batch_first=True)
        given_T = torch.empty(self.spans[-1].stop, dtype=torch.long)
        for row, tokens in enumerate(taken):
            given_T[tokens] = row * taken_RL.shape[1] + torch.arange(len(tokens))
        return taken_RL.to(self.device), given_T.to(self.device)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """(1, 1, L, L), true where a token sees another of its window."""
    sees_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return sees_LL.triu(1 - window)[None, None]
