"""A shard file gives back what was written, as safetensors reads it, and a damaged one is refused at open."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gpt2x.errors import UserError
from gpt2x.shards.files import open_shard, token_dtype, write_shard

METADATA = {"tokenizer_fingerprint": "abc", "vocab_size": "50257", "eos_token_id": "0"}


@pytest.fixture
def shard_file(tmp_path):
    file = tmp_path / "tokens_part_00000.safetensors"
    tokens = np.arange(10_000, dtype=np.uint16)
    write_shard(file, tokens=tokens, documents=np.array([0, 4, 10_000]), metadata=METADATA)
    return file


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_what_is_written_is_what_is_opened(tmp_path, dtype):
    tokens = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 999).astype(dtype)
    write_shard(tmp_path / "shard", tokens=tokens, documents=np.array([0, 3, 999]), metadata=METADATA)
    shard = open_shard(tmp_path / "shard")
    assert shard.tokens.dtype == dtype
    np.testing.assert_array_equal(shard.tokens, tokens)
    assert shard.documents.tolist() == [0, 3, 999]
    assert shard.metadata == METADATA


def test_the_safetensors_library_reads_a_shard(shard_file):
    arrays = load_file(shard_file)
    np.testing.assert_array_equal(arrays["tokens"], np.arange(10_000, dtype=np.uint16))
    assert arrays["documents"].tolist() == [0, 4, 10_000]
    with safe_open(shard_file, "np") as opened:
        assert opened.metadata() == METADATA


def test_a_shard_that_the_safetensors_library_wrote_opens(tmp_path):
    arrays = {"tokens": np.arange(7, dtype=np.uint32), "documents": np.array([0, 7])}
    save_file(arrays, tmp_path / "shard", metadata=METADATA)
    assert open_shard(tmp_path / "shard").tokens.tolist() == list(range(7))


def test_opening_a_shard_reads_none_of_its_tokens(tmp_path):
    file = tmp_path / "large"
    tokens = np.zeros(1, np.uint16)
    write_shard(file, tokens=tokens, documents=np.array([0, 1]), metadata={})
    num_tokens = 2**40  # two terabytes that are not there: a sparse file
    header = {
        "documents": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
        "tokens": {"dtype": "U16", "shape": [num_tokens], "data_offsets": [16, 16 + 2 * num_tokens]},
    }
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text + struct.pack("<qq", 0, num_tokens))
        stream.truncate(8 + len(text) + 16 + 2 * num_tokens)
    assert open_shard(file).tokens.size == num_tokens


def test_writing_the_same_twice_gives_the_same_bytes(tmp_path):
    hashes = {
        write_shard(
            tmp_path / name, tokens=np.arange(5, dtype=np.uint16), documents=np.array([0, 5]), metadata=metadata
        )
        for name in "ab"
        for metadata in (METADATA, dict(reversed(METADATA.items())))
    }
    assert len(hashes) == 1


def test_the_vocabulary_decides_the_dtype():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


@pytest.mark.parametrize("change", [-1, -5000, 1, 4096])
def test_a_truncated_or_grown_file_is_refused_with_both_sizes(shard_file, change):
    size = shard_file.stat().st_size
    os.truncate(shard_file, size + change)
    with pytest.raises(UserError, match=rf"00000.safetensors: expected {size} bytes, found {size + change}; delete"):
        open_shard(shard_file)


@pytest.mark.parametrize("size", [0, 5, 40])
def test_a_file_that_ends_inside_its_header_is_refused(shard_file, size):
    os.truncate(shard_file, size)
    with pytest.raises(UserError, match=rf"its {size} bytes end inside the header, or it is no token shard"):
        open_shard(shard_file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"gone.safetensors is missing; delete the directory and prepare"):
        open_shard(tmp_path / "gone.safetensors")


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors: its header is not that of a token shard"):
        open_shard(tmp_path / "model.safetensors")


def test_an_array_of_another_dtype_is_refused(tmp_path):
    save_file({"tokens": np.zeros(3, np.float32), "documents": np.array([0, 3])}, tmp_path / "shard")
    with pytest.raises(UserError, match=r"shard: {'dtype': 'F32', .*} does not describe an array of tokens"):
        open_shard(tmp_path / "shard")


@pytest.mark.parametrize("dtypes", [("int64", "int64"), ("uint16", "uint16")])
def test_arrays_with_each_others_dtype_are_refused(tmp_path, dtypes):
    arrays = {"tokens": np.zeros(3, dtypes[0]), "documents": np.array([0, 3], dtypes[1])}
    save_file(arrays, tmp_path / "shard")
    with pytest.raises(UserError, match=r"tokens must be U16 or U32 and documents I64"):
        open_shard(tmp_path / "shard")


@pytest.mark.parametrize("documents", [[1, 3], [0, 4], [0, 2, 1, 3], [0, 0, 3], [0]])
def test_document_bounds_that_do_not_fit_the_tokens_are_refused(tmp_path, documents):
    write_shard(
        tmp_path / "shard", tokens=np.zeros(3, np.uint16), documents=np.array(documents, np.int64), metadata={}
    )
    with pytest.raises(UserError, match=r"shard: documents must start at 0, grow and end at 3"):
        open_shard(tmp_path / "shard")


def test_a_shape_that_does_not_fit_its_offsets_is_refused(shard_file):
    content = shard_file.read_bytes()
    shard_file.write_bytes(content.replace(b'"shape": [10000]', b'"shape": [90000]'))
    with pytest.raises(UserError, match=r"'shape': \[90000\], .*} does not describe an array of tokens"):
        open_shard(shard_file)


def test_an_id_outside_the_vocabulary_is_named_with_its_position(shard_file):
    shard = open_shard(shard_file)
    shard.check_token_ids(10_000)
    with pytest.raises(UserError, match=r"00000.safetensors: token id 4096 at position 4096 is outside .* of 4096;"):
        shard.check_token_ids(4096)


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        Path.mkdir,
        lambda file: file.symlink_to("/dev/zero"),
        lambda file: file.symlink_to(file.name),
    ],
    ids=["fifo", "directory", "device", "loop"],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "shard")
    with pytest.raises(UserError, match=r"shard (is no regular file|cannot be read \(.*\)); delete the directory and"):
        open_shard(tmp_path / "shard")


ARRAYS = {
    "documents": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
    "tokens": {"dtype": "U16", "shape": [4], "data_offsets": [16, 24]},
}
STRANGE = [
    [],
    {"tokens": None},
    {"tokens": []},
    {"tokens": {"dtype": ["U16"], "shape": [4], "data_offsets": [16, 24]}},
    {"tokens": {"dtype": {}, "shape": [4], "data_offsets": [16, 24]}},
    {"tokens": {"dtype": "U16", "shape": 4, "data_offsets": [16, 24]}},
    {"tokens": {"dtype": "U16", "shape": [4.0], "data_offsets": [16, 24]}},
    {"tokens": {"dtype": "U16", "shape": [], "data_offsets": [16, 24]}},
    {"tokens": {"dtype": "U16", "shape": [4], "data_offsets": [16]}},
    {"tokens": {"dtype": "U16", "shape": [4], "data_offsets": ["16", "24"]}},
    {"tokens": {"dtype": "U16", "shape": [4], "data_offsets": [-8, 24]}},
    {"tokens": {"dtype": "U16", "shape": [2**70], "data_offsets": [16, 24]}},
    {"targets": 3},
    {"__metadata__": [1]},
    {"__metadata__": {"tokenizer_fingerprint": 3}},
]


@pytest.mark.parametrize("change", STRANGE, ids=json.dumps)
def test_a_header_of_strange_types_is_refused_in_a_line(tmp_path, change):
    header = json.dumps(change if change == [] else {**ARRAYS, **change}).encode()
    (tmp_path / "shard").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    with pytest.raises(UserError, match=r"its header is not that of a token shard|does not describe an array of tok"):
        open_shard(tmp_path / "shard")


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"tokens": ' + b"9" * 5_000, b"\xff{}", b'{"a": NaN}'])
def test_a_header_that_is_no_strict_json_is_refused_in_a_line(tmp_path, header):
    (tmp_path / "shard").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    with pytest.raises(UserError, match=r"its header is not that of a token shard"):
        open_shard(tmp_path / "shard")
