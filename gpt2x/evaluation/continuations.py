"""Log-probabilities of several continuations of one context, for multiple-choice questions.

Several questions are one row, each its context once and then its continuations. Each continuation sees the context and
itself (branches.py), and its positions go on from the context's, so that the row says what one row per continuation
would say. The head and the softmax see only the positions that predict a continuation (selected_logits.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from gpt2x.distributed.devices import on_device, without_cudnn_attention
from gpt2x.distributed.ranks import data_rank, sum_over_ranks
from gpt2x.errors import UserError
from gpt2x.evaluation.branches import Branching, branches_of_pass, branching_attention
from gpt2x.evaluation.packed import packed_weights
from gpt2x.evaluation.selected_logits import selected_logits, selective_head
from gpt2x.evaluation.side_by_side import side_by_side

_REPLACEABLE_LAYERS = {"full_attention", "sliding_attention"}
# Rows of logits that stay in a processor's cache until the softmax has read them.
_ROWS_AT_A_TIME = 128


@dataclass(frozen=True, kw_only=True)
class Question:
    """Token ids of a context, at least one, and of its continuations, at least one each."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A context with the continuations that share it.

    Attributes:
        context: token ids.
        branches: (place in the flat list of all continuations, token ids).
    """

    context: list[int]
    branches: list[tuple[int, list[int]]]

    def __len__(self) -> int:
        return len(self.ids())

    def ids(self) -> list[int]:
        """The context, then of every continuation all tokens but the last, which predicts nothing."""
        return self.context + [token for _, ids in self.branches for token in ids[:-1]]

    def branching(self) -> Branching:
        """Which of the tokens belong together."""
        return Branching(context=len(self.context), branches=[len(ids) - 1 for _, ids in self.branches])

    def predicting(self) -> list[int]:
        """Where the tokens of the continuations are predicted: the first of each by the context's last."""
        last, start, places = len(self.context) - 1, len(self.context), []
        for _, ids in self.branches:
            places += [last, *range(start, start + len(ids) - 1)]
            start += len(ids) - 1
        return places


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """B rows of T tokens, and N tokens that they predict, in the order of those that predict them.

    Attributes:
        ids: (B, T) tokens: all questions one after the other (B = 1), or one continuation a row, padded on the right.
        questions: which of the tokens belong together, where the questions are one row.
        predicting: (N,) which of the B * T tokens predicts each.
        targets: (N,) the predicted tokens.
        places: (N,) to which continuation they belong.
    """

    ids: Tensor
    questions: list[Branching] | None
    predicting: Tensor
    targets: Tensor
    places: Tensor


def score_continuations(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[Tensor] | None:
    """Summed log-probabilities (natural, softmax in float32) of each question's continuations.

    A context that is too long for the model loses its beginning. The model is left in the mode it was in. Ranks make
    the same number of forward passes, which DDP and shards need.

    Args:
        model: a causal language model of transformers, plain or prepared by the accelerator.
        questions: the same on all ranks.
        batch_size: questions of a forward pass; continuations where the model's attention is not one that others
            may replace (recurrent models, ALiBi). On a CPU each core computes a pass of its own (side_by_side.py).
        accelerator: splits the rows over its ranks, which all get all scores.
        is_stopped: asked before each batch; must answer alike on all ranks.

    Returns:
        The scores; None where is_stopped ended it.

    Raises:
        UserError: where a continuation is longer than what the model takes, and for a model of one piece
            (selected_logits.py).
    """
    plain = model if accelerator is None else accelerator.unwrap_model(model)
    check_lengths(plain, questions)
    shares = shares_contexts(plain)
    rows = sorted(_rows(questions, _longest(plain), shares), key=len, reverse=True)  # the largest fail first
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    scores = torch.zeros(sum(len(question.continuations) for question in questions), dtype=torch.float64)
    own, was_stopped = _of_this_rank(batches, accelerator), False

    def until_stopped() -> Iterator[_Batch]:
        nonlocal was_stopped
        for batch, _ in own:
            was_stopped = is_stopped()
            if was_stopped:
                return
            yield _collate(batch, shares)

    # The passes of several processes keep step.
    is_free = plain.device.type == "cpu" and (accelerator is None or accelerator.num_processes == 1)
    score = partial(_score, model, plain, at_a_time=_ROWS_AT_A_TIME if is_free else None)
    compute = side_by_side if is_free and not torch.is_autocast_enabled("cpu") else map
    with _scoring(model, plain, shares):
        found = list(compute(score, until_stopped()))  # on the device, from which all is fetched at the end
    if was_stopped:
        return None
    for (places, log_probs), (_, counts) in zip(found, own, strict=True):
        if counts:
            scores.index_add_(0, places, log_probs.cpu().double())
    if accelerator is not None:
        scores = sum_over_ranks(scores, accelerator)
    return list(scores.split([len(question.continuations) for question in questions]))


@contextmanager
def _scoring(model: nn.Module, plain: PreTrainedModel, shares: bool) -> Iterator[None]:
    """The model as it scores; afterwards it is in the mode, and computes its attention, as before."""
    was_training = model.training
    model.eval()
    eager = torch.compiler.set_stance("force_eager")  # other shapes would compile everything once more
    attending = branching_attention(plain) if shares else nullcontext()
    with eager, packed_weights(plain), attending, selective_head(plain), without_cudnn_attention():
        try:
            yield
        finally:
            model.train(was_training)


def check_lengths(model: PreTrainedModel, questions: Sequence[Question]) -> None:
    """Raises UserError where a continuation is longer than what the model takes."""
    longest = _longest(model)
    num_ids = max(len(ids) for question in questions for ids in question.continuations)
    if longest is not None and num_ids > longest:
        raise UserError(
            f"an ending of the HellaSwag items has {num_ids} tokens, and the model takes {longest}; give items with "
            f"shorter endings, or a model that takes longer sequences."
        )


def shares_contexts(model: PreTrainedModel) -> bool:
    """Whether all that the model sees of other tokens goes through an attention that branches.py can replace."""
    layers = set(model.config.get_text_config().to_dict().get("layer_types") or ())
    is_replaceable = model._supports_attention_backend and model._supports_sdpa
    return is_replaceable and not model._is_stateful and layers <= _REPLACEABLE_LAYERS


def _longest(model: PreTrainedModel) -> int | None:
    """How many tokens the model takes; None where its configuration sets no limit."""
    fields = model.config.get_text_config().to_dict()
    return fields.get("max_position_embeddings", fields.get("n_positions"))


def _rows(questions: Sequence[Question], longest: int | None, shares: bool) -> Iterator[_Row]:
    place = 0
    for question in questions:
        context = list(question.context)
        branches = [(place + i, list(ids)) for i, ids in enumerate(question.continuations)]
        place += len(branches)
        num_ids = max(len(ids) for _, ids in branches)
        # The last token of a continuation is predicted but not read.
        if shares and (longest is None or len(context) + num_ids - 1 <= longest):
            yield _Row(context=context, branches=branches)
            continue
        for branch in branches:
            start = 0 if longest is None else max(len(context) + len(branch[1]) - 1 - longest, 0)
            yield _Row(context=context[start:], branches=[branch])


def _of_this_rank(batches: list[list[_Row]], accelerator: Accelerator | None) -> list[tuple[list[_Row], bool]]:
    """This rank's batches, and whether they count: as many on every rank, since sharded models wait for each other."""
    own = []
    place = None if accelerator is None else data_rank(accelerator)
    rank, num_ranks = (0, 1) if place is None else (place.rank, place.num_ranks)
    for first in range(0, len(batches), num_ranks):
        counts = first + rank < len(batches)
        own.append((batches[first + rank if counts else first], counts))
    return own


def _collate(rows: Sequence[_Row], shares: bool) -> _Batch:
    """Rows as one without padding where contexts are shared, else below each other."""
    longest = max(map(len, rows))
    starts = accumulate((len(row) if shares else longest for row in rows), initial=0)
    predicting = [start + place for row, start in zip(rows, starts, strict=False) for place in row.predicting()]
    ids = [torch.tensor(row.ids()) for row in rows]
    continuations = [branch for row in rows for branch in row.branches]
    targets = torch.tensor([token for _, ids in continuations for token in ids])
    places = torch.tensor([place for place, ids in continuations for _ in ids])
    predicting_N, order_N = torch.tensor(predicting).sort(stable=True)
    return _Batch(
        ids=torch.cat(ids)[None] if shares else pad_sequence(ids, batch_first=True),
        questions=[row.branching() for row in rows] if shares else None,
        predicting=predicting_N,
        targets=targets[order_N],
        places=places[order_N],
    )


@torch.no_grad()
def _score(model: nn.Module, plain: PreTrainedModel, batch: _Batch, *, at_a_time: int | None) -> tuple[Tensor, Tensor]:
    """(places, log-probabilities on the device) of the predicted tokens.

    Logits are asked for so many at a time. Which of them are read is known here, so that no device is waited for.
    """
    inputs = {"input_ids": batch.ids}
    attending: AbstractContextManager = nullcontext()
    if batch.questions is not None:
        inputs["position_ids"] = torch.cat([question.positions() for question in batch.questions])[None]
        attending = branches_of_pass(batch.questions, plain.device)
    # The continuations of a context have the place of their first token in common.
    places_P, counts_P = torch.unique_consecutive(batch.predicting, return_counts=True)
    ends_P = [0, *counts_P.cumsum(0).tolist()]
    own = {"places": places_P, "place": torch.repeat_interleave(counts_P), "targets": batch.targets}
    places_P, place_N, targets_N = on_device(own, plain.device).values()
    found, done = [], 0
    with attending:
        for logits_PV in selected_logits(model, on_device(inputs, plain.device), places_P, at_a_time=at_a_time):
            for logits in logits_PV.split(_ROWS_AT_A_TIME):
                here = slice(ends_P[done], ends_P[done + len(logits)])
                log_probs = logits.log_softmax(-1, dtype=torch.float32)
                found.append(log_probs[place_N[here] - done, targets_N[here]])
                done += len(logits)
    return batch.places, torch.cat(found)
