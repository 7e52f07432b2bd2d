"""A run on a mixture: its accounts, its phases, and the masking of documents."""

import math
import shutil

import numpy as np
import pytest

from gpt2x.config import SourceSection
from gpt2x.errors import UserError
from gpt2x.shards.files import write_shard
from gpt2x.shards.index import Index, ShardEntry, load_index, write_index


@pytest.fixture
def mixture(recipe, changed, shards_dir):
    """The recipe on two sources, of three parts and one of the tokens."""

    def make(weights, **changes):
        sources = [SourceSection(name=name, path=shards_dir, weight=weight) for name, weight in weights.items()]
        data = {"path": None, "sources": sources, "block_size": 20, **changes.pop("data", {})}
        return changed(recipe, data=data, **changes)

    return make


def write_conversations(directory, split, *, seed, like):
    """A shard of conversations of at most 16 tokens, a third of them as long as that and not learned at all."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 17, 300)
    lengths[::3] = 16
    documents = np.cumsum([0, *lengths])
    tokens = generator.integers(1, 270, documents[-1]).astype(np.uint16)
    targets = (generator.random(tokens.size) < 0.5).astype(np.uint8)
    for start in documents[:-1:3]:
        targets[start : start + 16] = 0
    targets[documents[:-1]] = 0
    file = directory / split / "tokens_part_00000.safetensors"
    file.parent.mkdir(parents=True)
    metadata = {"tokenizer_fingerprint": like.tokenizer_fingerprint}
    sha256 = write_shard(file, tokens=tokens, documents=documents, metadata=metadata, targets=targets)
    return ShardEntry(file=file.name, num_tokens=tokens.size, num_documents=300, num_bytes=tokens.size, sha256=sha256)


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory, shards_dir):
    """Conversations beside the documents of the other tests, of the same tokenizer."""
    directory, like = tmp_path_factory.mktemp("chat"), load_index(shards_dir)
    splits = {
        split: [write_conversations(directory, split, seed=seed, like=like)]
        for seed, split in enumerate(("train", "validation"))
    }
    shutil.copytree(like.tokenizer_dir, directory / "tokenizer")
    write_index(
        Index(
            directory=directory,
            splits=splits,
            tokenizer_fingerprint=like.tokenizer_fingerprint,
            vocab_size=like.vocab_size,
            eos_token_id=like.eos_token_id,
            recipe={},
        )
    )
    return directory


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
    with pytest.raises(
        UserError, match=r"was run with another recipe; .*--resume\.\n(?s:.*)data.sources\[\d\].weight  3.0  1.0$"
    ):
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


def conversations(changed, recipe, chat_dir, **changes):
    return changed(recipe, data={"path": chat_dir, "packing": "whole_documents"}, **changes)


def test_whole_conversations_train_through_sequences_of_which_nothing_is_learned(recipe, changed, pretrain, chat_dir):
    """One sequence per micro-batch, so that some of these have nothing to learn either."""
    run = pretrain(conversations(changed, recipe, chat_dir, train={"micro_batch_size": 1, "max_steps": 6}))
    losses = [record["train/loss"] for record in train_records(run)]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
    parts = run.job.batches.batches.step(0).micro_batches
    assert {int((part["labels"] != -100).sum()) for part in parts} >= {0}
    assert run.validation.num_tokens == run.job.validation_batches.num_targets


def test_whole_conversations_go_on_where_they_stood(recipe, changed, pretrain, chat_dir, assert_equal_tensors):
    train = {"max_steps": 10, "save_steps": None}
    straight = pretrain(conversations(changed, recipe, chat_dir, run={"name": "straight"}, train=train))
    halved = conversations(changed, recipe, chat_dir, train=train)
    pretrain(halved, stop_after=4)
    resumed = pretrain(halved)
    assert_equal_tensors(straight.saved(), resumed.saved())
    assert [r["data/checksum"] for r in train_records(straight)] == [
        r["data/checksum"] for r in train_records(resumed)
    ]


@pytest.mark.parametrize("packing", ["continuous", "documents"])
def test_a_mixture_is_validated_as_a_whole_and_by_source(recipe, changed, pretrain, shards_dir, chat_dir, packing):
    sources = [
        SourceSection(name="web", path=shards_dir, weight=1.0),
        SourceSection(name="chat", path=chat_dir, weight=1.0),
    ]
    run = pretrain(changed(recipe, data={"path": None, "sources": sources, "block_size": 20, "packing": packing}))
    parts = run.validation.sources
    assert list(parts) == ["web", "chat"]
    assert sum(part.num_tokens for part in parts.values()) == run.validation.num_tokens
    nats = sum(part.loss * part.num_tokens for part in parts.values())
    assert run.validation.loss == pytest.approx(nats / run.validation.num_tokens, rel=1e-6)
    last = [record for record in run.records() if "val/loss" in record][-1]
    assert [last["val/web/loss"], last["val/chat/loss"]] == [parts["web"].loss, parts["chat"].loss]


def test_samples_of_conversations_answer_their_beginnings(recipe, changed, start, chat_dir):
    job, _ = start(conversations(changed, recipe, chat_dir, evaluation={"num_validation_prompts": 3}))
    (shard,) = load_index(chat_dir).open_split("validation")
    beginnings = []
    for begin, end in zip(shard.documents[:-1], shard.documents[1:]):
        learned = np.flatnonzero(shard.targets[begin:end])
        length = learned[0] if learned.size else end - begin  # which no end of text ends
        beginnings.append(job.tokenizer.decode(shard.tokens[begin : begin + length]))
    job.batches.close()
    samples = job.evaluators[-1]
    assert len(samples.prompts) == 3
    assert set(samples.prompts) <= set(beginnings)
