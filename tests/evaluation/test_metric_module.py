"""The modules for the evaluate library, loaded by path and without network."""

import math
from pathlib import Path

import pytest

evaluate = pytest.importorskip("evaluate", reason="evaluate is in the extra eval")

METRICS = Path(__file__).parents[2] / "gpt2x" / "evaluation" / "metrics"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """evaluate.load by path, its caches in a directory of the test's."""
    caches = tmp_path_factory.mktemp("evaluate")

    def call(name):
        return evaluate.load(str(METRICS / name), cache_dir=str(caches / "cache"), experiment_id="test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", caches)
        yield call


def test_hellaswag_counts_the_largest_and_the_largest_per_length(load):
    found = load("hellaswag").compute(
        predictions=[[-1.0, -2.0, -3.0, -4.0], [-9.0, -8.0, -7.0, -6.0], [-5.0, -2.0, -4.0, -4.0]],
        references=[0, 0, 1],
        lengths=[[1, 9, 9, 9], [90, 8, 7, 6], [1, 2, 2, 2]],
    )
    # By itself the largest: 0, 3, 1. Per length: 1, 0, 1.
    assert found["acc"] == found["acc_norm"] == pytest.approx(2 / 3)
    assert found["acc_stderr"] == pytest.approx(math.sqrt((2 / 3) * (1 / 3) / 2))
    assert found["num_items"] == 3


def test_hellaswag_agrees_with_the_evaluation_itself(load, model, tokenizer, tmp_path):
    import json

    from hellaswag_text import rows

    from gpt2x.evaluation.hellaswag import evaluate_hellaswag
    from gpt2x.evaluation.hellaswag_items import load_hellaswag

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    items = load_hellaswag(file)
    expected = evaluate_hellaswag(model, tokenizer, items)
    found = load("hellaswag").compute(
        predictions=expected.log_probs.tolist(),
        references=[item.label for item in items],
        lengths=expected.lengths.tolist(),
    )
    assert found == {name: pytest.approx(getattr(expected, name)) for name in found}


def test_bits_per_byte_counts_utf8(load):
    found = load("bits_per_byte").compute(predictions=[math.log(2) * 6, math.log(2) * 2], references=["éé", "abcd"])
    assert found == {"bits_per_byte": pytest.approx(1.0), "num_bytes": 8}
