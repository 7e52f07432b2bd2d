"""Imported shards hold the same tokens, and a killed import ends in the same bytes."""

import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import foreign_files as written
import numpy as np
import pytest
from foreign_files import tokens_of

from gpt2x.config.importing import ImportRecipe
from gpt2x.errors import UserError
from gpt2x.preparation.importing import import_tokens
from gpt2x.shards.index import load_index
from gpt2x.shards.token_sets import open_tokens
from gpt2x.tokenizers.bpe import load_tokenizer, tokenizer_fingerprint


@pytest.fixture
def recipe(directory, tmp_path, tokenizer) -> ImportRecipe:
    return ImportRecipe(
        path=str(directory), tokenizer=tokenizer, output_dir=tmp_path / "out", tokens_per_shard=200, split_seed=1
    )


def content(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def documents_of(index, split: str) -> list[list[int]]:
    shards = index.open_split(split)
    return [
        shard.tokens[start:end].tolist()
        for shard in shards
        for start, end in zip(shard.documents[:-1], shard.documents[1:])
    ]


@pytest.mark.parametrize("write", written.WRITERS)
def test_the_tokens_stay_the_same(write, directory, recipe, ids, documents, tokenizer):
    half = sum(map(len, documents[:30]))
    write(directory, "train", ids[:half])
    write(directory, "val", ids[half:])
    index = import_tokens(recipe)
    assert load_index(recipe.output_dir) == index
    assert len(index.splits["train"]) > 1
    assert tokens_of(recipe.output_dir, tokenizer) == ids[:half]
    assert tokens_of(recipe.output_dir, tokenizer, "validation") == ids[half:]
    assert documents_of(index, "train") == documents[:30]


def test_a_saved_dataset_is_imported(directory, recipe, ids, tokenizer):
    written.dataset(ids).save_to_disk(directory / "saved")
    index = import_tokens(dataclasses.replace(recipe, path=str(directory / "saved"), validation_fraction=0))
    assert not index.has_split("validation")
    assert tokens_of(recipe.output_dir, tokenizer) == ids


def test_shards_are_cut_anew(directory, recipe, ids, tokenizer, tmp_path):
    written.nanogpt(directory, "train", ids)
    written.nanogpt(directory, "val", ids)
    import_tokens(recipe)
    again = dataclasses.replace(
        recipe, path=str(recipe.output_dir), output_dir=tmp_path / "again", tokens_per_shard=10_000
    )
    assert len(import_tokens(again).splits["train"]) == 1
    assert tokens_of(again.output_dir, tokenizer) == ids


def test_the_counts_are_those_of_the_text(directory, recipe, ids, texts):
    written.nanogpt(directory, "train", ids)
    written.nanogpt(directory, "val", ids)
    index = import_tokens(recipe)
    assert index.total("train", "num_bytes") == sum(len(text.encode()) for text in texts)
    assert index.total("train", "num_documents") == len(texts)
    assert index.total("train", "num_tokens") == len(ids)


def test_where_nothing_is_held_out_documents_are_by_their_hash(directory, recipe, documents, tokenizer):
    written.nanogpt(directory, "train", sum([*documents, *documents], []))  # noqa: RUF017
    recipe = dataclasses.replace(recipe, validation_fraction=0.3)
    train, held_out = (documents_of(import_tokens(recipe), split) for split in ("train", "validation"))
    assert sorted(train + held_out) == sorted(documents + documents)
    assert not [document for document in held_out if document in train]
    assert 10 < len(held_out) < 40
    other = dataclasses.replace(recipe, split_seed=2, output_dir=recipe.output_dir / "other")
    assert documents_of(import_tokens(other), "validation") != held_out


def test_the_split_is_the_same_whatever_the_files_look_like(directory, recipe, ids, tmp_path):
    """The ids count, not their width, their file or their order of documents."""
    held_out = []
    for number, write in enumerate([written.nanogpt, written.torch_file, written.parquet]):
        (directory / str(number)).mkdir()
        write(directory / str(number), "train", ids)
        output_dir = tmp_path / f"out{number}"
        here = dataclasses.replace(
            recipe, path=str(directory / str(number)), output_dir=output_dir, validation_fraction=0.3
        )
        held_out.append(documents_of(import_tokens(here), "validation"))
    assert held_out[0] == held_out[1] == held_out[2] != []


def test_a_document_that_goes_on_in_the_next_file_stays_whole(directory, recipe, documents, ids):
    cut = len(documents[0]) + 3
    written.nanogpt(directory, "part_1", ids[:cut])
    written.nanogpt(directory, "part_2", ids[cut:])
    written.nanogpt(directory, "val", ids)
    assert documents_of(import_tokens(recipe), "train") == documents


def test_a_last_document_gets_the_end_of_text_that_it_lacks(directory, recipe, documents, ids):
    written.nanogpt(directory, "train", ids[:-1])
    written.nanogpt(directory, "val", ids)
    assert documents_of(import_tokens(recipe), "train") == documents


def test_listed_documents_get_the_ends_of_text_that_they_lack(directory, recipe):
    file = written.datatrove(directory, "train", [5, 6, 7, 8, 9, 0])
    np.array([3, 6], np.uint64).tofile(f"{file}.index")
    recipe = dataclasses.replace(recipe, validation_fraction=0)
    assert documents_of(import_tokens(recipe), "train") == [[5, 6, 7, 0], [8, 9, 0]]


def test_the_tokenizer_is_saved_beside_the_shards(directory, recipe, ids, tokenizer):
    written.nanogpt(directory, "train", ids)
    index = import_tokens(dataclasses.replace(recipe, validation_fraction=0))
    assert tokenizer_fingerprint(load_tokenizer(index.tokenizer_dir)) == index.tokenizer_fingerprint
    assert open_tokens(str(recipe.output_dir), tokenizer=tokenizer) == index


def test_what_is_finished_is_left_alone_and_other_data_refused(directory, recipe, ids):
    file = written.nanogpt(directory, "train", ids)
    recipe = dataclasses.replace(recipe, validation_fraction=0)
    import_tokens(recipe)
    before = {file: file.stat().st_mtime_ns for file in recipe.output_dir.rglob("*")}
    import_tokens(recipe)
    assert {file: file.stat().st_mtime_ns for file in recipe.output_dir.rglob("*")} == before
    with pytest.raises(
        UserError, match=r"out' holds data of another import .* \(other tokens_per_shard\); set another"
    ):
        import_tokens(dataclasses.replace(recipe, tokens_per_shard=100))
    written.nanogpt(directory, "train", ids[::-1])
    with pytest.raises(UserError, match=r"\(other imported\); set another output_dir, or delete that directory"):
        import_tokens(recipe)
    assert file.is_file()


def test_of_two_that_import_into_one_directory_the_second_finds_it_done(directory, recipe, ids, capsys):
    written.nanogpt(directory, "train", ids)
    recipe, results = dataclasses.replace(recipe, validation_fraction=0), []
    pair = [threading.Thread(target=lambda: results.append(import_tokens(recipe))) for _ in range(2)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()
    assert results[0] == results[1]
    line = rf"{recipe.output_dir}: already imported on \d{{4}}-\d\d-\d\d \([\d,]+ tokens\)\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_a_split_that_gets_no_document_is_refused(directory, recipe, documents):
    written.nanogpt(directory, "train", documents[0])
    with pytest.raises(
        UserError, match=r"none of the 1 documents of '.*' falls into validation \(validation_fraction 1e-"
    ):
        import_tokens(dataclasses.replace(recipe, validation_fraction=1e-9))


def test_a_killed_import_that_is_begun_again_ends_in_the_same_bytes(directory, recipe, documents, tmp_path):
    written.nanogpt(directory, "train", np.resize(np.concatenate(documents), 8_000).tolist())
    fields = {"tokens_per_shard": 500, "validation_fraction": 0.2, "split_seed": 0}
    recipe = dataclasses.replace(recipe, **fields)
    code = (
        "import time\n"
        "from pathlib import PosixPath\n"
        "from gpt2x.preparation.importing import import_tokens\n"
        "from gpt2x.shards import writer\n"
        "from gpt2x.config.importing import ImportRecipe\n"
        "write = writer.write_shard\n"
        "writer.write_shard = lambda *place, **parts: (write(*place, **parts), time.sleep(0.2))[0]\n"
        f"import_tokens({recipe!r})\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    killed = subprocess.Popen([sys.executable, "-c", code], env=environment)
    third = recipe.output_dir / "train" / "tokens_part_00002.safetensors"
    while not third.exists() and killed.poll() is None:
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() == -9
    assert not (recipe.output_dir / "index.json").exists()
    stale = recipe.output_dir / "train" / "tokens_part_99999.safetensors"
    stale.write_bytes(b"of a killed import with more shards")
    for output_dir in (recipe.output_dir, tmp_path / "undisturbed"):
        import_tokens(dataclasses.replace(recipe, output_dir=output_dir))
    assert content(recipe.output_dir) == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("fraction", [-0.1, 1])
def test_a_fraction_that_is_none_is_refused(fraction, recipe):
    with pytest.raises(ValueError, match=rf"validation_fraction \({fraction}\) must be .* at least 0 and below 1"):
        dataclasses.replace(recipe, validation_fraction=fraction)
