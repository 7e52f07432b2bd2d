"""Token files of other projects open as they are, and a wrong guess is an error, never noise."""

import os
import re
from pathlib import Path

import foreign_files as written
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from foreign_files import refusal, tokens_of
from huggingface_hub import constants

from gpt2x.shards.token_sets import open_tokens

GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize("write", written.WRITERS)
def test_a_file_gives_the_ids_that_were_written(write, directory, ids, tokenizer):
    assert tokens_of(write(directory, "train", ids), tokenizer) == ids


def test_a_large_vocabulary_has_four_bytes_per_id(directory, large_tokenizer):
    ids = GENERATOR.integers(0, 70_000, 99)
    ids.astype(np.uint32).tofile(directory / "train.bin")
    assert tokens_of(directory, large_tokenizer) == ids.tolist()


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_wide_ids_of_a_small_vocabulary_are_not_read_as_ids_and_zeros(dtype, directory, ids, tokenizer):
    np.array(ids, dtype).tofile(directory / "train.bin")
    assert tokens_of(directory, tokenizer) == ids


def test_two_bytes_per_id_are_refused_for_a_large_vocabulary(directory, ids, large_tokenizer):
    file = written.numpy_file(directory, "train", ids)
    message = f"{file}: its ids of 2 bytes cannot be of a vocabulary of 70000; give the tokenizer that made them."
    assert refusal(directory, large_tokenizer) == message
    raw = written.nanogpt(directory, "raw", np.resize(ids, 1000).tolist())
    assert re.match(rf"{raw}: token id \d+ at position 0 is outside the vocabulary", refusal(raw, large_tokenizer))


def test_an_odd_number_of_bytes_is_refused(directory, ids, tokenizer):
    file = written.nanogpt(directory, "train", ids)
    os.truncate(file, 2 * len(ids) - 1)
    assert f"{file}: its {2 * len(ids) - 1} bytes are not a whole number of ids of 2 bytes; copy it" in refusal(
        directory, tokenizer
    )


@pytest.mark.parametrize("write", written.WRITERS)
def test_an_id_outside_the_vocabulary_is_named_with_its_place(write, directory, ids, tokenizer):
    file = write(directory, "train", [*ids[:100], 300, *ids[100:]])
    message = f"{file}: token id 300 at position 100 is outside the vocabulary of 300; use the tokenizer that the ids"
    assert refusal(directory, tokenizer).startswith(message)


@pytest.mark.parametrize("kind", ["npy", "pt", "parquet"])
def test_a_negative_id_is_refused(kind, directory, tokenizer):
    ids = np.array([5] * 30 + [-100], np.int64)
    file = directory / f"train.{kind}"
    if kind == "npy":
        np.save(file, ids)
    elif kind == "pt":
        torch.save(torch.from_numpy(ids), file)
    else:
        pq.write_table(pa.table({"input_ids": [ids.tolist()]}), file)
    assert f"{file}: token id -100 at position 30 is outside the vocabulary" in refusal(directory, tokenizer)


@pytest.mark.parametrize(("magic", "version"), [(20240520, 2), (20240801, 1), (20240328, 1), (7, 1)])
def test_another_magic_number_or_version_is_refused(magic, version, directory, ids, tokenizer):
    file = written.llmc(directory, "train", ids, magic=magic, version=version)
    assert refusal(directory, tokenizer) == (
        f"{file}: its header begins with {magic} version {version}; token files of llm.c have 20240520 version 1 or "
        f"20240801 version 7."
    )


@pytest.mark.parametrize("change", [-2, 2, -1])
def test_a_size_that_is_not_the_headers_is_refused(change, directory, ids, tokenizer):
    file, size = written.llmc(directory, "train", ids), 1024 + 2 * len(ids)
    os.truncate(file, size + change)
    message = f"its header says {len(ids)} tokens, hence {size} bytes, found {size + change}; copy it again."
    assert refusal(directory, tokenizer) == f"{file}: {message}"


@pytest.mark.parametrize("change", [-2, 2])
def test_datatroves_size_must_be_that_of_its_description(change, directory, ids, tokenizer):
    file = written.datatrove(directory, "train", ids)
    os.truncate(file, 2 * len(ids) + change)
    assert f"its .metadata says {len(ids)} tokens of 2 bytes, hence {2 * len(ids)}, found" in refusal(file, tokenizer)


def test_datatroves_description_must_be_one(directory, ids, tokenizer):
    file = written.datatrove(directory, "train", ids)
    Path(f"{file}.metadata").write_text("tokenizer\n")
    assert f"{file}.metadata: must say tokenizer|bytes per id, 2 or 4, and below" in refusal(file, tokenizer)


@pytest.mark.parametrize("ends", [[3, 2], [1, 2, 3], []])
def test_datatroves_document_ends_must_fit(ends, directory, tokenizer):
    file = written.datatrove(directory, "train", [5] * 30)
    np.array(ends, np.uint64).tofile(f"{file}.index")
    assert f"{file}.index: document ends must grow and end at {file.name}'s 30 tokens" in refusal(file, tokenizer)


def test_datatroves_documents_are_those_of_its_index_even_without_ends_of_text(directory, tokenizer):
    file = written.datatrove(directory, "train", [5] * 30)
    np.array([10, 30], np.uint64).tofile(f"{file}.index")
    (shard,) = open_tokens(str(file), tokenizer=tokenizer).open_split("train")
    assert shard.documents.tolist() == [0, 10, 30]


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(is_zip, directory, tmp_path, tokenizer):
    file = directory / "tokens_part_0.pt"
    torch.save(written.Payload(tmp_path / "sentinel"), file, _use_new_zipfile_serialization=is_zip)
    assert f"{file}: is broken, or holds more than a tensor, which is not run; save" in refusal(directory, tokenizer)
    assert not (tmp_path / "sentinel").exists()


def test_a_pickled_numpy_array_is_refused_and_not_run(directory, tmp_path, tokenizer):
    np.save(directory / "a.npy", np.array([written.Payload(tmp_path / "sentinel")], dtype=object), allow_pickle=True)
    assert f"{directory}/a.npy: numpy cannot map it (" in refusal(directory, tokenizer)
    assert not (tmp_path / "sentinel").exists()


def test_a_truncated_tensor_is_refused(directory, tokenizer):
    file = written.torch_file(directory, "train", [1] * 5000)
    os.truncate(file, 20_000)
    assert f"{file}: is broken, or holds more than a tensor" in refusal(directory, tokenizer)


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint16), np.zeros(4, np.float32), np.zeros(0, np.uint16)])
@pytest.mark.parametrize("kind", ["npy", "pt"])
def test_what_is_not_a_list_of_ids_is_refused(kind, array, directory, tokenizer):
    file = directory / f"a.{kind}"
    np.save(file, array) if kind == "npy" else torch.save(torch.tensor(array.tolist()), file)
    assert refusal(file, tokenizer) == (
        f"{file}: token ids must be one array of integers, 1-D and not empty; save it as that."
    )


def test_a_dictionary_of_tensors_is_refused(directory, tokenizer):
    torch.save({"tokens": torch.arange(9)}, directory / "a.pt")
    assert "a.pt: token ids must be one array of integers" in refusal(directory, tokenizer)


@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
def test_text_is_refused(name, directory, tokenizer):
    (directory / name).write_text("to be or not to be, that is the question\n" * 50)
    message = f"{directory / name} is none of the token files that can be read (numpy, torch, Parquet, Arrow, llm.c, "
    assert refusal(directory / name, tokenizer).startswith(message)


@pytest.mark.parametrize("name", ["a.pt", "a.arrow", "a.parquet"])
def test_a_name_does_not_make_a_format(name, directory, tokenizer):
    (directory / name).write_bytes(GENERATOR.bytes(2000))
    assert "is none of the token files that can be read" in refusal(directory, tokenizer)


def test_an_empty_file_is_refused(directory, tokenizer):
    (directory / "train.bin").touch()
    assert refusal(directory, tokenizer) == f"{directory}/train.bin is empty; delete it or copy it again."


@pytest.mark.parametrize("write", [written.parquet, written.arrow_file, written.arrow_stream])
def test_a_truncated_table_is_refused(write, directory, ids, tokenizer):
    file = write(directory, "train", ids)
    os.truncate(file, file.stat().st_size * 2 // 3)
    assert f"{file}: pyarrow cannot read it (" in refusal(directory, tokenizer)


def test_a_table_without_token_ids_is_refused_with_the_columns_that_it_has(directory, tokenizer):
    pq.write_table(pa.table({"text": ["a"], "url": ["b"]}), directory / "a.parquet")
    message = f"{directory}/a.parquet has no column 'input_ids' but text, url; rename the column of token ids, or"
    assert refusal(directory, tokenizer).startswith(message)


@pytest.mark.parametrize("values", [["a"], [1], [[0.5]]])
def test_a_column_that_holds_no_lists_of_integers_is_refused(values, directory, tokenizer):
    pq.write_table(pa.table({"input_ids": values}), directory / "a.parquet")
    assert "a.parquet: input_ids must hold lists of integers, not " in refusal(directory, tokenizer)


@pytest.mark.parametrize("values", [[[1], None], [[1], [None]]])
def test_nulls_are_refused(values, directory, tokenizer):
    pq.write_table(pa.table({"input_ids": pa.array(values, pa.list_(pa.int32()))}), directory / "a.parquet")
    assert "a.parquet: input_ids has nulls from token 0 on; leave those rows out." in refusal(directory, tokenizer)


def test_a_table_without_a_token_is_refused(directory, tokenizer):
    pq.write_table(pa.table({"input_ids": pa.array([[]], pa.list_(pa.int32()))}), directory / "a.parquet")
    assert "a.parquet: input_ids holds no token; leave the file out." in refusal(directory, tokenizer)


def test_lists_of_fixed_and_of_large_size_are_read(directory, tokenizer):
    for number, kind in enumerate([pa.list_(pa.int64(), 2), pa.large_list(pa.int16())]):
        table = pa.table({"input_ids": pa.array([[1, 2], [3, 4]], kind)})
        pq.write_table(table, directory / f"{number}.parquet")
    assert tokens_of(directory, tokenizer) == [1, 2, 3, 4] * 2


def test_a_table_is_rewritten_once_and_again_when_it_changes(directory, cache_dir, ids, tokenizer):
    file = written.parquet(directory, "train", ids)
    assert tokens_of(file, tokenizer) == tokens_of(file, tokenizer) == ids
    assert len(list(cache_dir.glob("tokens-*.bin"))) == 1
    written.parquet(directory, "train", ids[5:])
    assert tokens_of(file, tokenizer) == ids[5:]


def test_a_table_says_so_where_its_ids_cannot_be_kept(directory, tmp_path, monkeypatch, ids, tokenizer):
    (tmp_path / "a file").touch()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "a file"))
    file = written.parquet(directory, "train", ids)
    assert re.match(rf"{file} is not mappable, and .* \(Not a directory\); let HF_HOME", refusal(file, tokenizer))


def test_nothing_half_written_is_left_where_a_table_is_refused(directory, cache_dir, ids, tokenizer):
    refusal(written.parquet(directory, "train", [*ids, 300]), tokenizer)
    assert list(cache_dir.glob("tokens-*.bin*")) == []
