"""Log-probabilities of continuations of a context: what multiple-choice questions ask of a causal language model.

Several questions are one row, each its context once and then its continuations. By the mask each continuation sees the
context and itself, and its positions go on from the context's, so that the row says what one row per continuation
would say. The head sees only the tokens that predict a continuation.

On a CPU every core takes passes of its own: cores that share a product wait for each other at its end, and a small
model has many small products.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.distributed.devices import on_device, without_cudnn_attention
from gpt2x.distributed.ranks import data_rank, sum_over_ranks
from gpt2x.errors import UserError

# Tokens of a pass: beyond, a row's attention, most of it hidden by the mask, counts beside the products.
_TOKENS_ON_A_CPU, _TOKENS_ELSEWHERE = 512, 4096
# More threads would wait for Python's lock, which a pass of a small model holds for a part of its time.
_MOST_THREADS = 8
# Rows of logits that stay in a processor's cache until the softmax has read them.
_ROWS_AT_A_TIME = 128


@dataclass(frozen=True, kw_only=True)
class Question:
    """Token ids of a context, at least one, and of its continuations, at least one each."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @property
    def num_tokens(self) -> int:
        """In a forward pass, at most."""
        return len(self.context) + sum(map(len, self.continuations))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model makes of the n continuations of a question."""

    log_probs: Tensor
    """(n,) float64: their tokens' log-probabilities (natural, softmax in float32), summed."""
    is_greedy: Tensor
    """(n,) bool: whether each of their tokens is the likeliest one."""


# A context, and of its continuations (place in the flat list of all continuations, token ids).
_Part = tuple[Sequence[int], list[tuple[int, Sequence[int]]]]


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """A row of T tokens, and N tokens that they predict."""

    inputs: dict[str, Tensor]
    """``input_ids`` (1, T); and where contexts are shared ``attention_mask`` (1, 1, T, T) and ``position_ids``."""
    predicting: Tensor
    """(N,) which of the T tokens predicts each."""
    targets: Tensor
    """(N,) the predicted tokens."""
    places: Tensor
    """(N,) to which continuation they belong."""


def score_continuations(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[Scores] | None:
    """Scores each question's continuations, which must not be longer than what the model takes (`check_lengths`).

    A context that is too long for the model loses its beginning. The model is left in the mode it was in. Ranks make
    the same number of forward passes, which DDP and shards need.

    Args:
        model: a causal language model of transformers, plain or prepared by the accelerator.
        questions: the same on all ranks.
        batch_size: questions of a forward pass; where `shares_contexts` says no, a pass has one continuation.
        accelerator: splits the passes over its ranks, which all get all scores.
        is_stopped: asked before each pass (of all cores, where each computes its own); must answer alike on all ranks.

    Returns:
        The scores; None where is_stopped ended it.
    """
    plain = _transformers_model(model)
    shares = shares_contexts(plain, questions)
    parts = sorted(_parts(questions, _longest(plain), shares), key=_num_tokens, reverse=True)  # the largest fail first
    size = batch_size if shares else 1
    passes = _of_this_rank([parts[start : start + size] for start in range(0, len(parts), size)], accelerator)
    score, found = partial(_score, model, plain.device, _takes(plain, "logits_to_keep")), []
    # The passes of several processes keep step, and torch's modes do not reach other threads.
    is_free = plain.device.type == "cpu" and (accelerator is None or accelerator.num_processes == 1)
    with (
        _scoring(model, plain, shares),
        _threads(is_free and not torch.is_autocast_enabled("cpu")) as (number, compute),
    ):
        for start in range(0, len(passes), number):
            if is_stopped():
                return None
            found += compute(score, [_collate(parts, shares) for parts, _ in passes[start : start + number]])

    # Only now is anything fetched from the device.
    sums = torch.zeros(2, sum(len(question.continuations) for question in questions), dtype=torch.float64)
    for (places_N, log_probs_N, is_likeliest_N), (_, counts) in zip(found, passes, strict=True):
        if counts:
            sums.index_add_(1, places_N, torch.stack([log_probs_N, ~is_likeliest_N]).cpu().double())
    if accelerator is not None:
        sums = sum_over_ranks(sums, accelerator)
    parted = sums.split([len(question.continuations) for question in questions], dim=1)
    return [Scores(log_probs=log_probs, is_greedy=misses == 0) for log_probs, misses in parted]


def shares_contexts(model: PreTrainedModel, questions: Sequence[Question]) -> bool:
    """Whether a mask decides all that the model sees of the questions' tokens, so that a row may hold several.

    Not in recurrent models, with ALiBi, and where a window is smaller than a question.
    """
    fields = model.config.get_text_config().to_dict()
    layers, window = set(fields.get("layer_types") or ()), fields.get("sliding_window")
    longest = max(len(question.context) + max(map(len, question.continuations)) for question in questions)
    is_masked = model._supports_attention_backend and model._supports_sdpa and not model._is_stateful
    is_whole = layers <= {"full_attention", "sliding_attention"} and (window is None or longest <= window)
    return is_masked and is_whole and _takes(model, "position_ids") and _takes(model, "logits_to_keep")


def check_lengths(model: PreTrainedModel, questions: Sequence[Question], *, name: str) -> None:
    """Raises UserError where a continuation is longer than what the model takes; `name` is that of the items."""
    longest = _longest(model)
    num_ids = max(len(ids) for question in questions for ids in question.continuations)
    if longest is not None and num_ids > longest:
        raise UserError(
            f"an ending of the {name} items has {num_ids} tokens, and the model takes {longest}; give items with "
            f"shorter endings, or a model that takes longer sequences."
        )


def fitting_batch_size(questions: Sequence[Question], device: torch.device) -> int:
    """How many questions of a forward pass suit a device."""
    tokens = _TOKENS_ON_A_CPU if device.type == "cpu" else _TOKENS_ELSEWHERE
    return max(tokens * len(questions) // sum(question.num_tokens for question in questions), 1)


def encode_questions(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, list[str]]]) -> list[Question]:
    """Questions of (context, continuations with the space before them), as lm-eval encodes them.

    Context and continuation are encoded together and cut after as many tokens as the context alone has, with the
    spaces at the context's end counted to the continuation.
    """
    wholes = iter(encode(tokenizer, [context + ending for context, endings in texts for ending in endings]))
    contexts = encode(tokenizer, [context.rstrip() for context, _ in texts])
    return [
        Question(context=ids, continuations=[next(wholes)[len(ids) :] for _ in endings])
        for ids, (_, endings) in zip(contexts, texts, strict=True)
    ]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: bool) -> list[list[int]]:
    """The texts' token ids."""
    return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **options)["input_ids"]


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    """The model in its wrappers (DDP, adapters)."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _takes(model: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters


def _longest(model: PreTrainedModel) -> int | None:
    """How many tokens the model takes; None where its configuration sets no limit."""
    fields = model.config.get_text_config().to_dict()
    return fields.get("max_position_embeddings", fields.get("n_positions"))


def _parts(questions: Sequence[Question], longest: int | None, shares: bool) -> Iterator[_Part]:
    """Questions whole, and in one part per continuation where they are too long or contexts are not shared."""
    place = 0
    for question in questions:
        context = question.context
        branches = list(enumerate(question.continuations, place))
        place += len(branches)
        # The last token of a continuation is predicted but not read.
        excess = [0 if longest is None else max(len(context) + len(ids) - 1 - longest, 0) for _, ids in branches]
        if shares and not any(excess):
            yield context, branches
        else:
            yield from ((context[start:], [branch]) for start, branch in zip(excess, branches, strict=True))


def _num_tokens(part: _Part) -> int:
    return len(part[0]) + sum(len(ids) - 1 for _, ids in part[1])


def _of_this_rank(passes: list[list[_Part]], accelerator: Accelerator | None) -> list[tuple[list[_Part], bool]]:
    """This rank's passes, and whether they count: as many on every rank, since sharded models wait for each other."""
    place = None if accelerator is None else data_rank(accelerator)
    rank, num_ranks = (0, 1) if place is None else (place.rank, place.num_ranks)
    own = []
    for first in range(0, len(passes), num_ranks):
        counts = first + rank < len(passes)
        own.append((passes[first + rank if counts else first], counts))
    return own


def _collate(parts: Sequence[_Part], shares: bool) -> _Pass:
    """The parts one after the other; of every continuation all tokens but the last, which predicts nothing."""
    ids: list[int] = []
    positions: list[int] = []
    owners: list[int] = []  # of each token: the place of its continuation, and a negative number for each context
    roots: list[int] = []  # that of its context
    predicting, targets, places = [], [], []
    for number, (context, branches) in enumerate(parts):
        last, root = len(ids) + len(context) - 1, -1 - number
        for place, read in [(root, context), *((place, branch[:-1]) for place, branch in branches)]:
            start = 0 if place == root else len(context)
            positions += range(start, start + len(read))
            owners += [place] * len(read)
            roots += [root] * len(read)
            if place != root:
                predicting += [last, *range(len(ids), len(ids) + len(read))]
            ids += read
        targets += [token for _, branch in branches for token in branch]
        places += [place for place, branch in branches for _ in branch]
    inputs = {"input_ids": torch.tensor([ids])}
    if shares:
        owners_T, roots_T = torch.tensor(owners), torch.tensor(roots)
        sees_TT = ((owners_T[:, None] == owners_T) | (roots_T[:, None] == owners_T)).tril()
        inputs |= {"attention_mask": sees_TT[None, None], "position_ids": torch.tensor([positions])}
    return _Pass(
        inputs=inputs,
        predicting=torch.tensor(predicting),
        targets=torch.tensor(targets),
        places=torch.tensor(places),
    )


@torch.no_grad()
def _score(model: nn.Module, device: torch.device, keeps: bool, one: _Pass) -> tuple[Tensor, Tensor, Tensor]:
    """Of the N predicted tokens the places, log-probabilities, and whether they are the likeliest; on the device."""
    there = on_device(one.inputs | {"predicting": one.predicting, "targets": one.targets}, device)
    predicting_N, targets_N = there.pop("predicting"), there.pop("targets")
    kept: dict[str, Any] = {"logits_to_keep": predicting_N} if keeps else {}
    logits_NV = model(**there, **kept, use_cache=False).logits[0]
    if not keeps:
        logits_NV = logits_NV[predicting_N]
    pieces = zip(logits_NV.split(_ROWS_AT_A_TIME), targets_N.split(_ROWS_AT_A_TIME), strict=True)
    losses = [F.cross_entropy(logits.float(), targets, reduction="none") for logits, targets in pieces]
    return one.places, -torch.cat(losses), logits_NV.argmax(-1) == targets_N


@contextmanager
def _scoring(model: nn.Module, plain: PreTrainedModel, shares: bool) -> Iterator[None]:
    """The model as it scores; afterwards it is in the mode, and computes its attention, as before."""
    was_training, attention = model.training, plain.config._attn_implementation
    model.eval()
    if shares:
        plain.set_attn_implementation("sdpa")  # one that takes any mask
    eager = torch.compiler.set_stance("force_eager")  # other shapes would compile everything once more
    with eager, without_cudnn_attention():
        try:
            yield
        finally:
            model.train(was_training)
            if shares:
                plain.set_attn_implementation(attention)


@contextmanager
def _threads(is_free: bool) -> Iterator[tuple[int, Callable]]:
    """(how many passes are computed at once, what maps a function over them)."""
    num_cores = torch.get_num_threads()
    number = min(num_cores, _MOST_THREADS) if is_free else 1
    if number == 1:
        yield 1, map
        return
    try:
        with ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(num_cores // number,)) as threads:
            yield number, threads.map
    finally:
        torch.set_num_threads(num_cores)  # which the threads have set for those to come, too
