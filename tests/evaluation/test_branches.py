"""Attention of several questions in one row against a row for every continuation, written out."""

from types import SimpleNamespace

import pytest
import torch

from gpt2x.evaluation.branches import Branching, _Branches

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
# of one, two, three and five continuations, some of them of no token that is read
QUESTIONS = [
    Branching(context=5, branches=[3]),
    Branching(context=1, branches=[0, 4]),
    Branching(context=7, branches=[2, 6, 1]),
    Branching(context=2, branches=[0, 0, 3, 0, 2]),
    Branching(context=3, branches=[0, 0]),
]
WAYS = {
    "by question": lambda branches, q, k, v, window: branches.attend_by_question(q, k, v, window, None),
    "in rows": lambda branches, q, k, v, window: branches.attend_in_rows(
        SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True), q, k, v, window, {}
    ),
}


def written_out(question, q_HTD, k_HTD, v_HTD, window):
    """Of each continuation the context and itself as a row of its own; (T, H, D)."""
    out = torch.empty(len(question), HEADS, WIDTH)
    for span in question.spans():
        places = [*range(question.context), *range(span.start, span.stop)]
        for end, place in enumerate(places):
            seen = places[max(end + 1 - (window or len(places)), 0) : end + 1]
            scores_HS = (k_HTD[:, seen] @ q_HTD[:, place, :, None])[..., 0] / WIDTH**0.5
            out[place] = (scores_HS.softmax(-1)[..., None] * v_HTD[:, seen]).sum(1)
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("way", WAYS)
def test_each_continuation_attends_as_in_a_row_of_its_own(way, window):
    torch.manual_seed(0)
    num_tokens = sum(map(len, QUESTIONS))
    q, k, v = (torch.randn(1, heads, num_tokens, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    found = WAYS[way](_Branches(QUESTIONS, torch.device("cpu")), q, k, v, window)
    whole_k, whole_v = (x.repeat_interleave(HEADS // KEY_HEADS, 1)[0] for x in (k, v))
    start = 0
    for question in QUESTIONS:
        own = slice(start, start + len(question))
        expected = written_out(question, q[0][:, own], whole_k[:, own], whole_v[:, own], window)
        torch.testing.assert_close(found[0, own], expected)
        start = own.stop


def test_positions_go_on_from_the_context():
    assert Branching(context=2, branches=[3, 0, 1]).positions().tolist() == [0, 1, 2, 3, 4, 2]
