"""The index says what is there, and a wrong one reaches nothing outside its directory."""

import json
import shutil

import pytest

from gpt2x.errors import UserError
from gpt2x.shards.index import load_index
from gpt2x.shards.preparation import prepare


@pytest.fixture
def index(recipe):
    return prepare(recipe)


def change(index, edit):
    file = index.directory / "index.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_a_written_index_is_read_back(index):
    assert load_index(index.directory) == index


def test_the_counts_are_those_of_the_shards(index):
    shards = index.open_split("train")
    assert len(shards) > 1
    assert index.total("train", "num_tokens") == sum(shard.tokens.size for shard in shards)
    assert index.total("train", "num_documents") == sum(shard.documents.size - 1 for shard in shards)


def test_the_fingerprint_moves_with_the_data_and_changes_with_it(index, tmp_path):
    moved = shutil.copytree(index.directory, tmp_path / "elsewhere")
    assert load_index(moved).fingerprint == index.fingerprint
    change(index, lambda content: content["splits"]["train"][0].update(sha256="0" * 64))
    assert load_index(index.directory).fingerprint != index.fingerprint


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a b", "a\n"])
def test_a_name_that_is_not_plain_is_refused(index, name):
    change(index, lambda content: content["splits"]["train"][0].update(file=name))
    with pytest.raises(UserError, match=r"index.json: .* must be a plain file name; delete the index and prepare"):
        load_index(index.directory)


def test_a_name_that_is_listed_twice_is_refused(index):
    change(index, lambda content: content["splits"]["train"].append(content["splits"]["train"][0]))
    with pytest.raises(UserError, match=r"'tokens_part_00000.safetensors' is listed twice"):
        load_index(index.directory)


def test_a_shard_that_is_a_link_is_refused(index):
    file = index.directory / "train" / "tokens_part_00000.safetensors"
    file.rename(index.directory / "real")
    file.symlink_to(index.directory / "real")
    with pytest.raises(UserError, match=r"tokens_part_00000.safetensors must not be a link; copy the shard itself"):
        index.open_split("train")


def test_a_shard_of_another_preparation_is_refused(index):
    directory = index.directory / "train"
    shutil.copy(directory / "tokens_part_00001.safetensors", directory / "tokens_part_00000.safetensors")
    with pytest.raises(UserError, match=r"index.json lists \d+ tokens and \d+ documents of tokenizer \w+, the file"):
        index.open_split("train")


def test_a_directory_without_an_index_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no token shards \(index.json\); make them by scripts/prepare_data.py"):
        load_index(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 1, "splits": {}}', "\xff"])
def test_a_broken_index_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"index.json is broken; delete it and prepare the data again"):
        load_index(tmp_path)


def test_an_index_of_another_format_version_is_refused(index):
    change(index, lambda content: content.update(format_version=2))
    with pytest.raises(UserError, match=r"index.json is not of format version 1; prepare the data again"):
        load_index(index.directory)


def test_a_split_without_shards_is_refused(index):
    change(index, lambda content: content["splits"].update(validation=[]))
    with pytest.raises(UserError, match=r"holds no validation tokens; prepare it again with corpus.validation_frac"):
        load_index(index.directory).open_split("validation")
