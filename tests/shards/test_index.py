"""The index says what is there, and a wrong one reaches nothing outside its directory."""

import json
import os
import random
import shutil

import pytest
from huggingface_hub import constants

from gpt2x import scan as scanning
from gpt2x.errors import UserError
from gpt2x.preparation.prepare import prepare
from gpt2x.shards.files import open_shard, write_shard
from gpt2x.shards.index import load_index
from gpt2x.shards.token_sets import open_tokens


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def index(recipe):
    return prepare(recipe)


def change(index, edit):
    """Edits an index as an earlier version wrote it, which had no sha256 of its own."""
    file = index.directory / "index.json"
    content = json.loads(file.read_text())
    content.pop("sha256", None)
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
    assert load_index(moved).split_fingerprint("train") == index.split_fingerprint("train")
    change(index, lambda content: content["splits"]["train"][0].update(sha256="0" * 64))
    assert load_index(index.directory).split_fingerprint("train") != index.split_fingerprint("train")


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


def test_a_split_that_is_a_link_is_refused_and_the_whole_directory_may_be_one(index, tmp_path):
    index.directory.rename(tmp_path / "large_disk")
    index.directory.symlink_to(tmp_path / "large_disk")
    assert load_index(index.directory).open_split("train")
    (index.directory / "train").rename(tmp_path / "elsewhere")
    (index.directory / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=rf"^{index.directory}/train must not be a link; put the folder itself there, o"
    ):
        load_index(index.directory).open_split("train")


def test_nothing_is_written_or_deleted_behind_a_link_in_the_directory_of_shards(recipe, tmp_path):
    others = tmp_path / "others" / "tokens_part_00009.safetensors"
    others.parent.mkdir()
    others.write_text("somebody's")
    recipe.output_dir.mkdir(parents=True)
    (recipe.output_dir / "train").symlink_to(others.parent)
    with pytest.raises(UserError, match="train must not be a link"):
        prepare(recipe)
    assert list(others.parent.iterdir()) == [others]


def test_a_shard_of_another_preparation_is_refused(index):
    directory = index.directory / "train"
    shutil.copy(directory / "tokens_part_00001.safetensors", directory / "tokens_part_00000.safetensors")
    with pytest.raises(UserError, match=r"index.json lists \d+ tokens and \d+ documents of tokenizer \w+, the file"):
        index.open_split("train")


def test_a_directory_without_an_index_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no token shards \(index.json\); make them by scripts/prepare_data.py"):
        load_index(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format_version": 1, "splits": {}}', "\xff", "[" * 100_000, '{"format_version": "1"}'],
)
def test_a_broken_index_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_text(content, encoding="latin-1")
    with pytest.raises(
        UserError, match=r"index.json is (no JSON|not as gpt2x writes it) \(.*\); delete it and prepare"
    ):
        load_index(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.update(splits=[]),
        lambda content: content["splits"].update(train={"0": 1}),
        lambda content: content["splits"]["train"].append("tokens_part_00000.safetensors"),
        lambda content: content["splits"]["train"][0].update(file=["a"]),
        lambda content: content["splits"]["train"][0].update(num_tokens="9"),
        lambda content: content["splits"]["train"][0].pop("sha256"),
        lambda content: content.update(vocab_size=None),
        lambda content: content.update(recipe=[1]),
        lambda content: content.update(dropped={"empty": "2"}),
    ],
)
def test_an_index_of_strange_types_is_refused_in_a_line(index, edit):
    change(index, edit)
    with pytest.raises(UserError, match=r"index.json is not as gpt2x writes it \(.*\); delete it and prepare"):
        load_index(index.directory)


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.mkdir(), lambda file: file.symlink_to("/dev/zero")])
def test_an_index_that_is_no_regular_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "index.json")
    with pytest.raises(
        UserError, match=r"index.json (is no regular file|cannot be read \(.*\)); delete it and prepare"
    ):
        load_index(tmp_path)


def test_a_bit_that_flips_in_the_index_is_noticed(index):
    """Most of it is compared with nothing else: counts of bytes, for one, which bits per byte are divided by."""
    file = index.directory / "index.json"
    content, refused = file.read_bytes(), 0
    generator = random.Random(0)
    for _ in range(100):
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        file.write_bytes(flipped)
        try:
            assert load_index(index.directory) == index  # of a space, or of the name of the sha256
        except UserError:
            refused += 1
    assert refused > 60


def test_an_index_that_was_edited_is_refused(index):
    file = index.directory / "index.json"
    content = json.loads(file.read_text())
    content["splits"]["validation"][0]["num_bytes"] += 1
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"index.json is not what was written there \(its own sha256 differs\); del"):
        load_index(index.directory)


def test_what_a_later_version_adds_is_passed_over(index):
    change(index, lambda content: content.update(later=[1]))
    change(index, lambda content: content["splits"]["train"][0].update(later=1))
    assert load_index(index.directory) == index


def test_a_bit_that_flips_on_the_disk_is_noticed_at_the_next_start(index):
    """Neither size nor time of the file change. Shards of up to 64 MB are compared as a whole at every start."""
    index.open_split("train")
    generator = random.Random(0)
    for _ in range(20):
        file = index.directory / "train" / generator.choice(index.splits["train"]).file
        content, times = bytearray(file.read_bytes()), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        flipped = bytearray(content)
        flipped[generator.randrange(1000, len(content))] ^= 1 << generator.randrange(8)
        file.write_bytes(flipped)
        os.utime(file, ns=times)
        with pytest.raises(
            UserError, match=rf"{file.name}(: its content has changed, though neither|.*prepare the dat)"
        ):
            index.open_split("train")
        file.write_bytes(content)
        os.utime(file, ns=times)
    assert len(index.open_split("train")) == len(index.splits["train"])


def test_an_index_of_another_format_version_is_refused(index):
    change(index, lambda content: content.update(format_version=2))
    with pytest.raises(UserError, match=r"index.json is not of format version 1; prepare the data again"):
        load_index(index.directory)


def test_a_split_without_shards_is_refused(index):
    change(index, lambda content: content["splits"].update(validation=[]))
    with pytest.raises(UserError, match=r"holds no validation tokens; prepare it again with corpus.validation_frac"):
        load_index(index.directory).open_split("validation")


def first_shard(index):
    return index.directory / "train" / "tokens_part_00000.safetensors"


def test_a_flipped_bit_is_noticed(index):
    content = bytearray(first_shard(index).read_bytes())
    content[-1000] ^= 1
    index.open_split("train")
    first_shard(index).write_bytes(content)
    listed = index.splits["train"][0].sha256[:12]
    message = rf"00000.safetensors: its content has changed \(index.json lists sha256 {listed}, the file has"
    for _ in range(2):
        with pytest.raises(UserError, match=message + r" \w{12}\); delete the directory and prepare"):
            index.open_split("train")


def test_a_shard_that_was_replaced_by_one_of_the_same_counts_is_noticed(index):
    shard = open_shard(first_shard(index))
    tokens, documents = shard.tokens[::-1].copy(), shard.documents.copy()
    write_shard(first_shard(index), tokens=tokens, documents=documents, metadata=shard.metadata)
    with pytest.raises(UserError, match=r"tokens_part_00000.safetensors: its content has changed"):
        index.open_split("train")


@pytest.mark.parametrize("change", [-2, 2])
def test_a_shard_that_was_truncated_or_has_grown_is_noticed(index, change):
    size = first_shard(index).stat().st_size
    os.truncate(first_shard(index), size + change)
    with pytest.raises(UserError, match=rf"00000.safetensors: expected {size} bytes, found {size + change};"):
        index.open_split("train")


def test_an_id_outside_the_vocabulary_is_named(index):
    change(index, lambda content: content.update(vocab_size=299))
    with pytest.raises(UserError, match=r"00000.safetensors: token id 299 at position \d+ is outside the vocab"):
        load_index(index.directory).open_split("train")


def test_opening_again_reads_no_token(index, monkeypatch):
    shards = index.open_split("train")

    def fail(file, tokens):
        raise AssertionError(f"{file} is read again")

    monkeypatch.setattr(scanning, "_scan", fail)
    assert [shard.id_range for shard in index.open_split("train")] == [shard.id_range for shard in shards]


def test_a_directory_with_an_index_is_opened_as_shards(index):
    assert open_tokens(str(index.directory)) == index
    assert open_tokens(str(index.directory), tokenizer=str(index.tokenizer_dir)) == index


def test_shards_take_no_other_tokenizer(index, recipe, tmp_path):
    other = shutil.copytree(index.tokenizer_dir, tmp_path / "other")
    content = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(content.replace('"<|endoftext|>"', '"<|end|>"'))
    config = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(config.replace('"<|endoftext|>"', '"<|end|>"'))
    with pytest.raises(UserError, match=r"data.tokenizer \(.*other\) is not the one that made the shards of '.*'"):
        open_tokens(str(index.directory), tokenizer=str(other))


def test_shards_take_no_other_held_out_files(index):
    with pytest.raises(UserError, match=r"data.validation_path \(x.bin\) belongs to token files of another project"):
        open_tokens(str(index.directory), validation_path="x.bin")
