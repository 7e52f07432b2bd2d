"""A ledger says where each shard begins and ends, and is either whole or not there."""

import json
import os

import pytest

from gpt2x.streams.ledger import (
    Beginning,
    Ledger,
    Position,
    StreamShard,
    changes,
    failure_file,
    ledger_file,
    ledger_of_json,
    read_failure,
    read_ledger,
    write_failure,
)


def shard(number, *, era=0, ends_era=True):
    return StreamShard(
        file=f"{number}", num_tokens=1, num_documents=1, num_bytes=1, sha256=f"{number}", number=number, era=era,
        ends_era=ends_era, start=position(number), end=position(number + 1),
    )  # fmt: skip


def position(number):
    return Position(state={"row": number}) if number else Position()


@pytest.fixture
def ledger():
    found = Ledger(definition={"tokens_per_shard": 5})
    found.follow([shard(0), shard(1, era=1, ends_era=False), shard(2, era=1)])
    return found


def test_a_ledger_comes_back_from_json_and_from_its_file(ledger, tmp_path):
    assert ledger_of_json(json.loads(json.dumps(ledger.as_json()))) == ledger
    ledger.write(tmp_path)
    assert read_ledger(tmp_path) == ledger


def test_the_next_shard_begins_where_the_last_one_ends(ledger):
    assert Ledger(definition={}).next == Beginning()
    assert ledger.next == Beginning(era=2, number=3, position=position(3))
    assert [ledger.start_of(number) for number in (0, 2, 3)] == [position(0), position(2), position(3)]


def test_only_shards_that_go_on_without_a_gap_are_taken_over(ledger):
    other_place = shard(3, era=2)
    ledger.follow([shard(4, era=3), StreamShard(**{**vars(other_place), "start": position(9)})])
    assert sorted(ledger.shards) == [0, 1, 2]
    ledger.follow([shard(4, era=3), shard(2, era=7), shard(3, era=2)])
    assert sorted(ledger.shards) == [0, 1, 2, 3, 4]
    assert ledger.shards[2].era == 1


def test_what_came_before_an_era_is_forgotten(ledger):
    beginning = Beginning(era=1, number=1, position=position(1))
    ledger.forget_before(beginning)
    assert (sorted(ledger.shards), ledger.beginning) == ([1, 2], beginning)
    ledger.forget_before(ledger.next)
    assert (ledger.shards, ledger.next.number) == ({}, 3)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"definition": {}, "beginning": {}}'])
def test_a_damaged_ledger_counts_as_none(tmp_path, content):
    ledger_file(tmp_path).write_bytes(content)
    assert read_ledger(tmp_path) is None
    assert read_ledger(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "edit", [{"shards": {}}, {"shards": [1]}, {"beginning": []}, {"validation": 3}, {"definition": 1}]
)
def test_a_ledger_of_strange_types_counts_as_none(ledger, tmp_path, edit):
    ledger_file(tmp_path).write_text(json.dumps({**ledger.as_json(), **(edit or {"definition": 1})}))
    assert read_ledger(tmp_path) is None


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.mkdir(), lambda file: file.symlink_to("/dev/zero")])
def test_a_ledger_and_a_failure_that_are_no_regular_files_count_as_none(tmp_path, make):
    make(ledger_file(tmp_path))
    make(failure_file(tmp_path))
    assert read_ledger(tmp_path) is None
    assert read_failure(tmp_path) is None


def test_a_failure_is_read_back(tmp_path):
    write_failure(tmp_path / "cache", "the server is gone")
    assert read_failure(tmp_path / "cache") == "the server is gone"


def test_changes_of_the_definition_are_named(ledger):
    assert changes(ledger.definition, ledger.definition) == ""
    assert changes(ledger.definition, {"tokens_per_shard": 6, "era": 1}) == "tokens_per_shard 5 -> 6, era None -> 1"
