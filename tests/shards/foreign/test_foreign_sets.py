"""What a path means: which files, which split, which tokenizer, which documents, how many bytes."""

import json
import pickle
from pathlib import Path

import datasets
import foreign_files as written
import numpy as np
import pytest
import torch
from foreign_files import refusal, tokens_of

from gpt2x.errors import UserError
from gpt2x.shards.token_sets import open_tokens


@pytest.mark.parametrize("write", written.WRITERS)
def test_a_directory_holds_out_the_file_with_val_in_its_name(write, directory, ids, tokenizer):
    write(directory, "train", ids[:300])
    write(directory, "val", ids[300:])
    assert tokens_of(directory, tokenizer) == ids[:300]
    assert tokens_of(directory, tokenizer, "validation") == ids[300:]


@pytest.mark.parametrize("write", written.WRITERS)
def test_documents_are_found_by_their_ends(write, directory, documents, ids, tokenizer):
    (shard,) = open_tokens(str(write(directory, "train", ids)), tokenizer=tokenizer).open_split("train")
    assert shard.documents.dtype == np.int64
    assert shard.documents.tolist() == np.cumsum([0, *map(len, documents)]).tolist()


def test_a_file_whose_ends_of_text_stand_in_front_begins_with_an_empty_document(directory, tokenizer):
    file = written.llmc(directory, "train", [0, 5, 6, 0, 7])
    (shard,) = open_tokens(str(file), tokenizer=tokenizer).open_split("train")
    assert shard.documents.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("write", [written.nanogpt, written.parquet])
def test_a_file_is_a_memory_map_that_nobody_can_write_through(write, directory, ids, tokenizer):
    (shard,) = open_tokens(str(write(directory, "train", ids)), tokenizer=tokenizer).open_split("train")
    assert isinstance(shard.tokens.base, np.memmap)
    assert not shard.tokens.flags.writeable


def test_a_tensor_cannot_be_written_through(directory, ids, tokenizer):
    (shard,) = open_tokens(str(written.torch_file(directory, "train", ids)), tokenizer=tokenizer).open_split("train")
    assert not shard.tokens.flags.writeable


def test_bytes_are_those_of_the_text(directory, texts, ids, tokenizer):
    written.nanogpt(directory, "train", ids)
    written.nanogpt(directory, "val", ids)
    tokens = open_tokens(str(directory), tokenizer=tokenizer)
    assert tokens.num_bytes("validation") == sum(len(text.encode()) for text in texts)


def test_bytes_of_a_tokenizer_that_is_not_byte_level_are_those_of_its_decoding(directory, large_tokenizer):
    np.array([5, 69_999, 0, 12, 0], np.uint32).tofile(directory / "train.bin")
    tokens = open_tokens(str(directory), tokenizer=large_tokenizer)
    assert tokens.num_bytes("train") == len("w5 w69999") + len("w12")


def test_tensors_and_shards_are_read_in_the_order_of_their_numbers(directory, tokenizer):
    for number in (10, 9, 2):
        torch.save(torch.full((20,), number), directory / f"tokens_part_{number}.pt")
    assert tokens_of(directory, tokenizer) == [2] * 20 + [9] * 20 + [10] * 20


def test_the_tokenizer_must_be_the_one_that_datatrove_names(directory, ids, tokenizer):
    file = written.datatrove(directory, "train", ids, tokenizer="meta-llama/Llama-3.1-8B")
    message = f"{file} was made by tokenizer 'meta-llama/Llama-3.1-8B', not by data.tokenizer '{tokenizer}'; give that"
    assert refusal(directory, tokenizer).startswith(message)
    Path(f"{file}.metadata").write_text(f"Unknown Tokenizer|2|2\n{len(ids)}\nmany")
    assert tokens_of(directory, tokenizer) == ids


def test_a_tokenizer_is_needed_and_the_one_that_a_file_names_is_told(directory, ids):
    written.datatrove(directory, "train", ids, tokenizer="gpt2")
    with pytest.raises(UserError, match=r"name the tokenizer .* as data.tokenizer, which is 'gpt2' as 00000_train_"):
        open_tokens(str(directory))


def test_a_tokenizer_is_needed_for_bare_ids(directory, ids):
    written.nanogpt(directory, "train", ids)
    with pytest.raises(UserError, match=r"another project wrote; name the tokenizer .* as data.tokenizer\.$"):
        open_tokens(str(directory))


def test_a_saved_dataset_is_read_without_the_caches_beside_it(directory, ids, tokenizer):
    written.dataset(ids).save_to_disk(directory / "saved", num_shards=3)
    written.arrow_stream(directory / "saved", "cache-123", [7])
    assert tokens_of(directory / "saved", tokenizer) == ids


def test_a_saved_dictionary_of_datasets_has_its_own_splits(directory, ids, tokenizer):
    parts = {"train": ids[:200], "validation": ids[200:300], "test": ids[300:]}
    saved = datasets.DatasetDict({name: written.dataset(part) for name, part in parts.items()})
    saved.save_to_disk(directory / "saved")
    assert tokens_of(directory / "saved", tokenizer) == ids[:200]
    assert tokens_of(directory / "saved", tokenizer, "validation") == ids[200:300]
    other = {"validation_path": str(directory / "saved" / "test")}
    assert tokens_of(directory / "saved", tokenizer, "validation", **other) == ids[300:]


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/passwd", "..", None, ["a"]])
def test_a_saved_dataset_reaches_nothing_outside_its_directory(name, directory, ids, tokenizer):
    written.dataset(ids).save_to_disk(directory / "saved")
    (directory / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    assert "state.json: " in (message := refusal(directory / "saved", tokenizer))
    assert message.endswith(" must be a plain name; save the dataset again by save_to_disk.")


def test_a_saved_dataset_that_lost_a_file_is_refused(directory, ids, tokenizer):
    written.dataset(ids).save_to_disk(directory / "saved")
    (directory / "saved" / "data-00000-of-00001.arrow").unlink()
    assert "arrow is missing, but state.json lists it; copy the directory" in refusal(directory / "saved", tokenizer)
    (directory / "saved" / "state.json").write_text("{")
    assert "state.json is missing or lists no _data_files; save" in refusal(directory / "saved", tokenizer)


def test_the_fingerprint_is_of_the_content(directory, tmp_path, ids, tokenizer):
    for name, content in {"a": ids, "b": ids, "c": [*ids[:-1], 5]}.items():
        (directory / name).mkdir()
        written.nanogpt(directory / name, "train", content)
    a, b, c = (open_tokens(str(directory / name), tokenizer=tokenizer).split_fingerprint("train") for name in "abc")
    assert a == b != c


def test_a_pickle_beside_the_files_is_not_even_looked_at(directory, tmp_path, ids, tokenizer):
    (directory / "meta.pkl").write_bytes(pickle.dumps(written.Payload(tmp_path / "sentinel")))
    written.nanogpt(directory, "train", ids)
    assert tokens_of(directory, tokenizer) == ids
    assert not (tmp_path / "sentinel").exists()


def test_several_formats_in_one_directory_are_refused_by_naming_two_files(directory, ids, tokenizer):
    raw, llmc = written.nanogpt(directory, "a", ids), written.llmc(directory, "val", ids)
    message = f"{raw} is raw ids and {llmc} is llm.c; name the files of one of them by a pattern."
    assert refusal(directory, tokenizer) == message
    assert tokens_of(f"{directory}/a*.bin", tokenizer) == ids


def test_held_out_files_may_be_named(directory, ids, tokenizer):
    for name, part in {"part_1": ids[:100], "part_2": ids[100:200], "part_3": ids[200:]}.items():
        written.nanogpt(directory, name, part)
    other = {"validation_path": str(directory / "part_2.bin")}
    assert tokens_of(directory, tokenizer, **other) == ids[:100] + ids[200:]
    assert tokens_of(directory, tokenizer, "validation", **other) == ids[100:200]


@pytest.mark.parametrize(
    ("name", "is_held_out"),
    [("val", True), ("x_VAL_01", True), ("valid-2", True), ("val1", True), ("value", False), ("interval", False)],
)
def test_val_is_a_word_of_the_name(name, is_held_out, directory, ids, tokenizer):
    written.nanogpt(directory, "train", ids)
    written.nanogpt(directory, name, ids)
    assert open_tokens(str(directory), tokenizer=tokenizer).has_split("validation") == is_held_out


def test_a_split_without_files_is_refused(directory, ids, tokenizer):
    written.nanogpt(directory, "train", ids)
    with pytest.raises(UserError, match=r"holds no validation tokens; name the held-out files by data.val"):
        tokens_of(directory, tokenizer, "validation")


def test_a_place_with_nothing_in_it_is_refused(directory, tokenizer):
    (directory / "README.md").write_text("tokens")
    assert refusal(directory, tokenizer).startswith(
        f"'{directory}' holds no token shards (index.json) and no token files of another project (.bin, .npy, .ds, "
    )
    assert (
        "/nowhere/at/all does not exist; give a directory of token shards, as scripts/prepare_data.py makes it"
        in refusal("/nowhere/at/all", tokenizer)
    )
