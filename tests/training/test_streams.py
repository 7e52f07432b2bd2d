"""A run that trains on a stream: the same samples however often it is stopped, and an end when the stream has one."""

import json
import random
import shutil

import pytest

from gpt2x.config import CorpusSection, SourceSection, StreamSection
from gpt2x.errors import UserError

WORDS = ["def", "return", "(", ")", ":", "\n", "self", "value", "=", "1", "été", "if"]


@pytest.fixture
def stream(shards_dir, tmp_path):
    """Rows of random words, tokenized by the tokenizer of the shards, four small shards in the cache."""
    generator, file = random.Random(0), tmp_path / "rows.jsonl"
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(20, 120))) for _ in range(120)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = CorpusSection(kind="dataset", dataset="json", data_files=[str(file)], validation_fraction=0.2)
    return StreamSection(
        corpus=corpus,
        tokenizer=str(shards_dir / "tokenizer"),
        cache_dir=tmp_path / "cache",
        max_cached_shards=4,
        shards_per_era=2,
        tokens_per_shard=800,
        retry_s=1,
        stall_s=10,
    )


@pytest.fixture
def streaming(recipe, changed, stream):
    """The recipe on the stream alone."""
    return changed(recipe, data={"path": None, "stream": stream})


def checksums(run):
    return [record["data/checksum"] for record in run.records() if "train/loss" in record]


@pytest.mark.trial
def test_a_run_on_a_stream_that_is_stopped_twice_equals_one_that_is_not(
    streaming, changed, pretrain, assert_equal_tensors, stream
):
    straight = pretrain(changed(streaming, run={"name": "straight"}))
    assert len(set(checksums(straight))) == 20
    pretrain(streaming, stop_after=6)
    shutil.rmtree(stream.cache_dir)
    pretrain(streaming, stop_after=13)
    resumed = pretrain(streaming)
    assert checksums(resumed) == checksums(straight)
    assert_equal_tensors(resumed.saved(), straight.saved())
    assert resumed.validation == straight.validation


def test_a_stream_is_one_source_of_a_mixture(recipe, changed, pretrain, stream, shards_dir):
    sources = [
        SourceSection(name="files", path=shards_dir, weight=3.0),
        SourceSection(name="web", stream=stream, weight=1.0),
    ]
    run = pretrain(changed(recipe, data={"path": None, "sources": sources, "block_size": 8}))
    assert {record["data/web/share"] for record in run.records() if "train/loss" in record} == {0.25}
    assert run.validation.num_tokens > 0


def test_a_run_whose_stream_breaks_is_saved_first_and_goes_on_when_it_is_mended(
    streaming, changed, pretrain, stream, tmp_path
):
    straight = pretrain(changed(streaming, run={"name": "straight"}))
    shutil.rmtree(stream.cache_dir)
    pretrain(streaming, stop_after=2)
    (tmp_path / "rows.jsonl").rename(tmp_path / "elsewhere.jsonl")
    shutil.rmtree(stream.cache_dir / "train")
    with pytest.raises(UserError, match=r"stream 'train' .*rows.jsonl"):
        pretrain(streaming)
    (tmp_path / "elsewhere.jsonl").rename(tmp_path / "rows.jsonl")
    assert checksums(pretrain(streaming)) == checksums(straight)


def test_a_stream_without_a_weight_is_refused_beside_another_source(recipe, changed, pretrain, stream, shards_dir):
    sources = [SourceSection(name="files", path=shards_dir), SourceSection(name="web", stream=stream)]
    with pytest.raises(UserError, match=r"source 'web' needs a weight: .* a stream's size is not known; set its"):
        pretrain(changed(recipe, data={"path": None, "sources": sources}))


def test_aligned_documents_are_refused_for_a_stream(streaming, changed, pretrain):
    with pytest.raises(UserError, match=r"data.align_documents is not made for streams; set it to false"):
        pretrain(changed(streaming, data={"align_documents": True}))
