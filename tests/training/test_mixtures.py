"""A run on a mixture: its accounts, its phases, and the masking of documents."""

import pytest

from gpt2x.config import SourceSection
from gpt2x.errors import UserError


@pytest.fixture
def mixture(recipe, changed, shards_dir):
    """The recipe on two sources, of three parts and one of the tokens."""

    def make(weights, **changes):
        sources = [SourceSection(name=name, path=shards_dir, weight=weight) for name, weight in weights.items()]
        data = {"path": None, "sources": sources, "block_size": 20, **changes.pop("data", {})}
        return changed(recipe, data=data, **changes)

    return make


def train_records(run):
    return [record for record in run.records() if "train/loss" in record]


def test_a_mixture_keeps_its_weights_and_says_so(mixture, pretrain):
    records = train_records(pretrain(mixture({"web": 3.0, "code": 1.0})))
    for record in records:
        assert record["data/web/target"] == 0.75
        assert record["data/web/share"] == pytest.approx(0.75, abs=20 / 8 / record["step"])
        assert record["data/web/tokens"] + record["data/code/tokens"] == record["tokens"]
    assert records[4]["data/web/share"] == 0.75  # two whole blocks
    assert records[-1]["data/web/epochs"] == pytest.approx(3 * records[-1]["data/code/epochs"])


def test_other_weights_start_a_phase_in_which_no_sample_comes_again(mixture, pretrain, capsys):
    pretrain(mixture({"web": 3.0, "code": 1.0}), stop_after=5)
    weights = {"web": 1.0, "code": 1.0, "chat": 2.0}
    resumed = pretrain(mixture(weights, resume=True))
    printed = "data: from step 5 on a new mixture, web 25.0%, code 25.0%, chat 50.0% in batches of 8 sequences; "
    assert printed in capsys.readouterr().out
    phases = resumed.job.batches.batches.order.phases
    assert [(phase.first_batch, dict(phase.weights)) for phase in phases] == [
        (0, {"web": 3.0, "code": 1.0}),
        (5, weights),
    ]
    records = train_records(resumed)
    assert records[-1]["data/web/tokens"] == (30 + 30) * 16
    assert records[-1]["data/chat/tokens"] == 60 * 16
    order, drawn = resumed.job.batches.batches.order, {}
    for step in range(20):
        for name, (_, draws) in order.samples(step, 0, 8).items():
            drawn.setdefault(name, []).extend(draws.tolist())
    assert all(sorted(draws) == list(range(len(draws))) for draws in drawn.values())


def test_a_phase_stays_after_the_next_resume(mixture, pretrain, assert_equal_tensors, changed):
    pretrain(mixture({"web": 3.0, "code": 1.0}), stop_after=5)
    later = mixture({"web": 1.0, "code": 1.0})
    straight = pretrain(changed(later, resume=True, run={"name": "tiny"}), stop_after=12)
    assert [phase.first_batch for phase in straight.job.batches.batches.order.phases] == [0, 5]
    again = pretrain(later)
    assert [phase.first_batch for phase in again.job.batches.batches.order.phases] == [0, 5]


def test_another_batch_size_goes_on_with_the_samples_that_are_next(recipe, changed, pretrain):
    pretrain(recipe, stop_after=5)
    resumed = pretrain(changed(recipe, train={"tokens_per_step": 64, "micro_batch_size": 4}, resume=True))
    order, drawn = resumed.job.batches.batches.order, []
    for step in range(20):
        drawn += order.samples(step, 0, 8 if step < 5 else 4)["train"][1].tolist()
    assert sorted(drawn) == list(range(5 * 8 + 15 * 4))


def test_another_mixture_is_another_recipe(mixture, pretrain):
    pretrain(mixture({"web": 3.0, "code": 1.0}), stop_after=5)
    with pytest.raises(UserError, match=r"was run with another recipe \(data.sources: .*--resume true"):
        pretrain(mixture({"web": 1.0, "code": 1.0}))


@pytest.mark.parametrize("change", [{"run": {"seed": 5}}, {"data": {"sequence_length": 8}}])
def test_what_would_repeat_samples_is_refused_also_with_resume(recipe, changed, pretrain, change):
    pretrain(recipe, stop_after=5)
    with pytest.raises(UserError, match=r"must stay \d+: with another, samples would be repeated and lost; "):
        pretrain(changed(recipe, **change, resume=True))


def test_a_source_of_another_tokenizer_is_refused(mixture, recipe, changed, pretrain, other_shards):
    sources = [SourceSection(path=recipe.data.path), SourceSection(name="other", path=other_shards)]
    with pytest.raises(UserError, match=r"source 'other' .* was made by another tokenizer than 'shards' "):
        pretrain(changed(recipe, data={"path": None, "sources": sources}))


def test_a_weight_for_some_sources_only_is_refused(mixture, pretrain):
    with pytest.raises(UserError, match=r"source 'code' needs a weight: either every source has one or none, "):
        pretrain(mixture({"web": 3.0, "code": None}))


def test_masked_documents_train_on_every_token_and_not_on_what_stands_before(recipe, changed, pretrain):
    masked = pretrain(changed(recipe, data={"packing": "documents"}))
    plain = pretrain(changed(recipe, run={"name": "plain"}))
    assert [r["data/checksum"] for r in train_records(masked)] == [r["data/checksum"] for r in train_records(plain)]
    losses = [[record["train/loss"] for record in train_records(run)] for run in (masked, plain)]
    assert losses[0] != losses[1]
    assert masked.validation.num_tokens == plain.validation.num_tokens


def test_aligned_documents_train_as_well(recipe, changed, pretrain):
    run = pretrain(changed(recipe, data={"align_documents": True}))
    source = run.job.batches.batches.sources["train"]
    assert source.num_windows < source.num_tokens // 16
    assert run.progress.step == 20


def test_the_number_of_workers_changes_nothing(recipe, changed, pretrain, assert_equal_tensors):
    none = pretrain(changed(recipe, data={"num_workers": 0}, run={"name": "none"}))
    three = pretrain(changed(recipe, data={"num_workers": 3}, run={"name": "three"}))
    assert_equal_tensors(none.saved(), three.saved())


def test_a_run_replays_from_its_checkpoint_without_the_batches_that_are_skipped(recipe, changed, pretrain):
    whole = train_records(pretrain(recipe))
    skipping = changed(recipe, run={"name": "skipping"})
    pretrain(skipping, stop_after=5)
    resumed = pretrain(changed(skipping, data={"skip": "8-10"}, resume=True))
    checksums = [record["data/checksum"] for record in train_records(resumed)]
    expected = [record["data/checksum"] for record in whole]
    assert checksums[:17] == expected[:8] + expected[11:]
