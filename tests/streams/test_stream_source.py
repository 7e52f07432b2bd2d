"""What a stream gives does not depend on when it is read, by whom, in how many goes, and with how much of a cache."""

import json
import os
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from naive_stream import LENGTH, NaiveStream, read

from gpt2x.errors import UserError
from gpt2x.shards.files import open_shard
from gpt2x.streams.ledger import failure_file, write_failure
from gpt2x.tokenizers.bpe import load_tokenizer

pytestmark = pytest.mark.usefixtures("in_thread")


def cached(section):
    return sorted((section.cache_dir / "train").glob("*"))


def texts_of(files, section):
    """The documents of shards."""
    tokenizer, texts = load_tokenizer(section.tokenizer), []
    for shard in map(open_shard, files):
        for start, end in zip(shard.documents[:-1], shard.documents[1:]):
            texts.append(tokenizer.decode(shard.tokens[start : end - 1]))
    return texts


def test_two_epochs_are_what_a_naive_reader_gives_and_the_cache_never_holds_more_than_it_may(
    section, open_source, naive
):
    counts, ended = [], threading.Event()

    def count():
        while not ended.wait(0.001):
            if (section.cache_dir / "train").is_dir():
                counts.append(len(cached(section)))

    watcher = threading.Thread(target=count)
    watcher.start()
    try:
        found = read(open_source(), 0, naive.num_draws)
    finally:
        ended.set()
        watcher.join()
    assert np.array_equal(found, naive.sequences(0, naive.num_draws))
    assert len(naive.eras) > 6
    assert max(counts) == section.max_cached_shards


def test_each_era_is_a_permutation_of_its_windows(open_source, naive):
    found = read(open_source(), 0, naive.first_draws[3])
    for era, start, stop in zip(naive.eras, naive.first_draws, naive.first_draws[1:4], strict=False):
        rows = [tuple(row) for row in found[start:stop]]
        assert Counter(rows) == Counter(map(tuple, era.windows))
        assert rows != [tuple(window) for window in era.windows]


def test_every_training_document_is_there_once_per_epoch_and_no_other(section, open_source, naive):
    per_epoch = len(naive.epoch_shards)
    source = open_source(max_cached_shards=100)
    source.require(naive.num_draws)
    for epoch in range(2):
        files = [
            section.cache_dir / "train" / f"tokens_part_{epoch * per_epoch + n:05d}.safetensors"
            for n in range(per_epoch)
        ]
        assert texts_of(files, section) == naive.training
    shards, num_bytes = source.validation_shards()
    held_out = texts_of([shard.file for shard in shards], section)
    assert held_out == naive.held_out[: len(held_out)]
    assert num_bytes == sum(len(text.encode()) for text in held_out)
    assert set(held_out).isdisjoint(naive.training)


def test_a_run_goes_on_exactly_twice_in_a_row_once_with_the_cache_deleted(section, open_source, naive, delete_cache):
    first = open_source()
    parts = [read(first, 0, 40)]
    states = [json.loads(json.dumps(first.state(40)))]
    read(first, 40, 56)  # what a run does between its last checkpoint and its end
    first.close()
    second = open_source(state=states[0])
    parts.append(read(second, 40, 96))
    states.append(json.loads(json.dumps(second.state(96))))
    validation = second.validation_shards()[0][0].tokens.tolist()
    second.close()
    delete_cache()
    third = open_source(state=states[1])
    parts.append(read(third, 96, naive.num_draws))
    assert np.array_equal(np.concatenate(parts), naive.sequences(0, naive.num_draws))
    assert third.validation_shards()[0][0].tokens.tolist() == validation


def test_places_that_a_resumed_stream_records_are_good_for_the_next_one(open_source, naive, delete_cache):
    parts, state, starts = [], None, range(0, naive.num_draws - 72, 60)
    for start in starts:
        source = open_source(state=state)
        parts.append(read(source, start, start + 60, step=4))
        state = json.loads(json.dumps(source.state(start + 60)))
        read(source, start + 60, start + 72, step=4)  # what the next run does again
        source.close()
        delete_cache()
    assert len(starts) > 5
    assert np.array_equal(np.concatenate(parts), naive.sequences(0, starts[-1] + 60))


def test_an_old_checkpoint_goes_on_with_what_has_long_left_the_cache(open_source, naive):
    first = open_source()
    read(first, 0, 24)
    state = first.state(24)
    read(first, 24, 150)
    first.close()
    assert np.array_equal(read(open_source(state=state), 24, 150), naive.sequences(24, 150))


def test_shards_that_are_missing_or_damaged_are_made_again(section, open_source, naive):
    first = open_source()
    read(first, 0, 16)
    state = first.state(16)
    first.require(naive.first_draws[2])
    first.close()
    files = cached(section)
    files[0].unlink()
    flipped = bytearray(files[1].read_bytes())
    flipped[-1] ^= 1
    files[1].write_bytes(flipped)
    files[2].write_bytes(b"short")
    assert np.array_equal(read(open_source(state=state), 16, 96), naive.sequences(16, 96))


def test_a_shard_that_is_deleted_while_the_run_goes_on_is_made_again(section, open_source, naive):
    source = open_source()
    read(source, 0, 8)
    while len(list((section.cache_dir / "train").glob("*.safetensors"))) < section.max_cached_shards:
        time.sleep(0.01)
    for file in cached(section):
        file.unlink()
    assert np.array_equal(read(source, 8, 96), naive.sequences(8, 96))


def test_a_damaged_validation_shard_is_made_again(section, open_source):
    source = open_source()
    (shard,), _ = source.validation_shards()
    expected = shard.tokens.tolist()
    read(source, 0, 40)
    state = source.state(40)
    source.close()
    shard.file.write_bytes(b"broken")
    (again,), _ = open_source(state=state).validation_shards()
    assert again.tokens.tolist() == expected


def test_what_comes_back_changed_is_refused(texts, section, open_source, delete_cache):
    first = open_source()
    read(first, 0, 40)
    state = first.state(40)
    first.close()
    delete_cache()
    for file in section.corpus.data_files:
        with open(file) as lines:
            content = lines.read()
        with open(file, "w") as lines:
            lines.write(content.replace("a", "b"))
    with pytest.raises(
        UserError, match=r"stream 'web': .* streamed again and is not what it was: json .* another stream.cache_dir"
    ):
        read(open_source(state=state), 40, 48)


def test_a_second_reader_and_many_threads_see_the_same(open_source, naive):
    source, reader = open_source(), open_source(fills=False)
    num_draws = naive.first_draws[2]
    source.require(num_draws)
    reader.require(num_draws)
    orders = [np.random.default_rng(number).permutation(num_draws) for number in range(6)]
    found = [None] * 6

    def run(number):
        found[number] = (source if number % 2 else reader).sequences(orders[number]).ids

    threads = [threading.Thread(target=run, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = naive.sequences(0, num_draws)
    for order, rows in zip(orders, found, strict=True):
        assert np.array_equal(rows, expected[order])


def test_a_place_can_be_named(section, open_source, naive):
    source = open_source()
    source.require(1)
    assert source.epochs(1) == 0.0
    assert source.locate(0).startswith(
        f"epoch 0, era 0, {section.cache_dir}/train/tokens_part_00000.safetensors, tokens "
    )
    start = int(source.locate(0).split("tokens ")[-1].split(" to ")[0])
    (sequence,) = source.sequences(np.array([0])).ids.tolist()
    assert sequence == naive.epoch_shards[0][start : start + LENGTH]
    read(source, 0, naive.num_draws)
    assert source.epochs(naive.num_draws - 1) == 1.0


def test_the_fingerprint_is_that_of_the_definition(section, open_source, tmp_path):
    source = open_source()
    same, other = tmp_path / "same", tmp_path / "other"
    assert open_source(cache_dir=same, retry_s=7.0, max_cached_shards=9).fingerprint == source.fingerprint
    assert open_source(cache_dir=other, tokens_per_shard=301).fingerprint != source.fingerprint


def test_a_broken_stream_ends_the_run_only_when_what_is_there_is_used_up(section, open_source, naive, monkeypatch):
    source = open_source()
    source.require(naive.first_draws[2])

    def unreachable(corpus):
        raise ConnectionResetError("the server went away")

    source_path = "gpt2x.streams.reading.open_rows"
    read(source, 0, 8)
    state = source.state(8)
    source.close()
    monkeypatch.setattr(source_path, unreachable)
    source = open_source(state=state, retry_s=0.3)
    there = naive.first_draws[2]
    assert np.array_equal(read(source, 8, there), naive.sequences(8, there))
    expected = r"stream 'web' \(.*part-0.jsonl.*\) is broken: the server went away; see to the connection .*0\.3"
    with pytest.raises(UserError, match=expected):
        read(source, there, naive.num_draws)
    reader = open_source(state=state, fills=False)
    reader.cache._created_at -= 60
    with pytest.raises(UserError, match=expected):
        read(reader, there, there + 8)


def test_the_failure_of_an_earlier_run_does_not_end_this_one(section, open_source, monkeypatch, tmp_path):
    for cache_dir in (section.cache_dir, tmp_path / "nobody_fills"):
        write_failure(cache_dir, "the stream of yesterday is broken")
    time.sleep(0.05)
    reader, _ = open_source(fills=False), open_source()
    reader.require(1)
    monkeypatch.setattr("gpt2x.streams.cache.OLD_FAILURE_S", 0.3)
    with pytest.raises(UserError, match="the stream of yesterday is broken"):
        open_source(fills=False, cache_dir=tmp_path / "nobody_fills").require(1)


def test_a_clock_that_is_set_back_hides_no_failure(section, open_source):
    """The failure is new, whatever time its file has."""
    reader = open_source(fills=False)
    write_failure(section.cache_dir, "the stream is broken")
    yesterday = time.time() - 86_400
    os.utime(failure_file(section.cache_dir), (yesterday, yesterday))
    closing = threading.Timer(5, reader.close)  # ends what would wait
    closing.start()
    with pytest.raises(UserError, match="the stream is broken"):
        reader.require(1)
    closing.cancel()


def test_a_missing_column_is_reported_with_those_that_there_are(section, open_source):
    source = open_source(corpus=replace(section.corpus, text_column="body"))
    with pytest.raises(UserError, match=r"stream 'web': .* has no column 'body', only: text; set corpus.text_column"):
        source.require(1)


def test_nothing_is_deleted_behind_a_link_in_the_cache(section, open_source, tmp_path):
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "thesis.txt").write_text("mine")
    section.cache_dir.mkdir()
    (section.cache_dir / "train").symlink_to(tmp_path / "somebodys")
    with pytest.raises(UserError, match=r"stream 'web': .*cache/train must not be a link; put the folder itself"):
        open_source().require(1)
    assert [file.name for file in (tmp_path / "somebodys").iterdir()] == ["thesis.txt"]


def test_an_empty_stream_is_refused(section, open_source):
    for file in section.corpus.data_files:
        with open(file, "w") as lines:
            lines.write('{"text": "   "}\n')
    with pytest.raises(UserError, match=r"no document to train on \(3 empty\); give it some text"):
        open_source().require(1)


def test_a_stream_without_held_out_documents_says_how_to_get_some(section, open_source, tmp_path):
    corpus = replace(section.corpus, validation_fraction=1e-9)
    source = open_source(corpus=corpus)
    expected = r"no document among .* raise corpus.validation_fraction \(1e-09\) or stream.tokens_per_shard \(300\)"
    with pytest.raises(UserError, match=expected):
        source.validation_shards()
    source = open_source(corpus=replace(corpus, validation_fraction=0.0), cache_dir=tmp_path / "none")
    with pytest.raises(UserError, match=r"raise corpus.validation_fraction \(0.0\)"):
        source.validation_shards()


def test_rows_without_text_are_left_out_and_counted(texts, section, open_source):
    lines = [json.dumps({"text": text}) for text in texts[0][:10]]
    lines[3:3] = ["{}", '{"text": null}', '{"text": " "}']
    for file in section.corpus.data_files:
        with open(file, "w") as out:
            out.write("\n".join(lines) + "\n")
    corpus = replace(section.corpus, data_files=section.corpus.data_files[:1], validation_fraction=0.0)
    naive = NaiveStream([texts[0][:10]], replace(section, corpus=corpus))
    source = open_source(corpus=corpus, max_cached_shards=100)
    assert np.array_equal(source.sequences(np.arange(naive.num_draws)).ids, naive.sequences(0, naive.num_draws))
    ledger = source.state(0)["ledger"]["shards"]
    assert sum(shard["left_out"].get("empty", 0) for shard in ledger if shard["start"]["epoch"] == 1) == 3


def test_a_cache_of_another_stream_is_refused(open_source):
    first = open_source()
    first.require(1)
    first.close()
    with pytest.raises(
        UserError, match=r"holds another stream \(tokens_per_shard 300 -> 200\); set another cache_dir"
    ):
        open_source(tokens_per_shard=200)


def test_a_state_of_another_stream_or_length_is_refused(open_source):
    first = open_source()
    first.require(1)
    state = first.state(1)
    first.close()
    with pytest.raises(UserError, match=r"is not the one of the checkpoint: shards_per_era 2 -> 1; set it back"):
        open_source(state=state, shards_per_era=1)
    with pytest.raises(UserError, match=r"data.sequence_length \(8\) must stay what it was for stream 'web' \(16\)"):
        open_source(state=state, length=8)


def test_a_cache_too_small_for_one_step_is_refused_instead_of_waited_for(open_source, naive):
    with pytest.raises(UserError, match=r"more than the cache holds; raise stream.max_cached_shards \(4\)"):
        open_source().require(naive.num_draws)


def test_shards_that_can_hold_no_sequence_are_refused(section, texts, open_source):
    with pytest.raises(
        UserError, match=r"stream.tokens_per_shard \(300\) must be at least data.sequence_length \(400\)"
    ):
        open_source(length=400)
    short = {"data_files": section.corpus.data_files[:1], "validation_fraction": 0.0}
    with open(short["data_files"][0], "w") as lines:
        lines.write(json.dumps({"text": texts[0][0]}) + "\n")
    with pytest.raises(UserError, match=r"no shard has the 299 tokens of data.sequence_length; set it to \d+ or less"):
        open_source(corpus=replace(section.corpus, **short), length=299).require(1)


def test_closing_ends_who_waits(open_source):
    source, failures = open_source(fills=False), []

    def wait():
        try:
            source.require(1)
        except RuntimeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    source.close()
    thread.join(5)
    assert failures == ["stream 'web' was closed while it was waited for."]
