"""Shards hold every document once, and however a preparation came about, they are the same bytes."""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from gpt2x.config import CorpusSection, PreparationRecipe, TokenizerSection
from gpt2x.corpus.documents import is_validation
from gpt2x.errors import UserError
from gpt2x.preparation.plan import plan_of
from gpt2x.preparation.prepare import (
    finalize,
    prepare,
    prepare_task,
    prepare_tokenizer,
)
from gpt2x.shards.index import load_index
from gpt2x.shards.statistics import statistics
from gpt2x.shards.writer import ShardWriter, Vocabulary


def texts(index, split):
    """The documents of a split, decoded one by one from its shards."""
    tokenizer = AutoTokenizer.from_pretrained(index.tokenizer_dir)
    decoded = []
    for shard in index.open_split(split):
        for start, end in zip(shard.documents[:-1], shard.documents[1:]):
            assert shard.tokens[end - 1] == index.eos_token_id
            decoded.append(tokenizer.decode(shard.tokens[start : end - 1].tolist()))
    return decoded


def whole_texts(corpus):
    """The texts of the fixture's corpus, read without gpt2x."""
    jsonl, txt = sorted(Path(corpus.paths[0]).parent.iterdir())
    return [json.loads(line)["text"] for line in jsonl.read_text().splitlines()] + [txt.read_text()]


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("split_seed", range(5))
def test_no_text_is_in_both_splits_even_if_the_corpus_repeats_it(recipe, corpus, corpus_dir, split_seed):
    (corpus_dir / "again.jsonl").write_bytes((corpus_dir / "many.jsonl").read_bytes())
    corpus = dataclasses.replace(corpus, split_seed=split_seed, validation_fraction=0.5)
    index = prepare(dataclasses.replace(recipe, corpus=corpus))
    train, validation = set(texts(index, "train")), set(texts(index, "validation"))
    assert not train & validation
    assert len(train | validation) == 61


@pytest.mark.parametrize("num_tasks", [1, *(pytest.param(number, marks=pytest.mark.trial) for number in (2, 7))])
def test_every_document_is_in_its_split_once(recipe, corpus, num_tasks):
    index = prepare(dataclasses.replace(recipe, num_tasks=num_tasks))
    for split in ("train", "validation"):
        expected = [text for text in whole_texts(corpus) if is_validation(text, corpus) == (split == "validation")]
        read = texts(index, split)
        assert sorted(read) == sorted(expected)
        if num_tasks == 1:
            assert read == expected, "one task keeps the corpus' order"


def test_the_index_counts_tokens_documents_and_bytes(recipe, corpus):
    index = prepare(recipe)
    read = [text for split in ("train", "validation") for text in texts(index, split)]
    total = {name: sum(index.total(split, name) for split in index.splits) for name in ("num_documents", "num_bytes")}
    assert total == {"num_documents": 61, "num_bytes": sum(len(text.encode()) for text in read)}
    for split in index.splits:
        for entry in index.splits[split]:
            content = (index.directory / split / entry.file).read_bytes()
            assert entry.sha256 == hashlib.sha256(content).hexdigest()


def test_no_shard_is_longer_than_asked_for(recipe):
    sizes = [shard.tokens.size for shard in prepare(recipe).open_split("train")]
    assert len(sizes) > 2
    assert max(sizes) <= 2000


def test_a_document_longer_than_a_shard_gets_one_to_itself(recipe):
    index = prepare(dataclasses.replace(recipe, tokens_per_shard=10))
    assert {shard.documents.size for shard in index.open_split("train")} == {2}


def test_a_document_that_spells_the_end_of_text_keeps_it_as_text(recipe, corpus_dir):
    (corpus_dir / "sly.txt").write_text("before<|endoftext|>after")
    index = prepare(recipe)
    assert "before<|endoftext|>after" in texts(index, "train") + texts(index, "validation")
    for split in index.splits:
        num_ends = sum(int((shard.tokens == index.eos_token_id).sum()) for shard in index.open_split(split))
        assert num_ends == index.total(split, "num_documents")


def test_the_tokenizer_sees_no_validation_document(recipe, corpus_dir):
    prepare(recipe)
    tokenizer_file = Path(recipe.tokenizer.path, "tokenizer.json")
    before = tokenizer_file.read_bytes()
    held_out = next(text for text in map(str, range(1000)) if is_validation(text + "zzzzzz" * 99, recipe.corpus))
    (corpus_dir / "held_out.txt").write_text(held_out + "zzzzzz" * 99)
    shutil.rmtree(tokenizer_file.parent)
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    assert tokenizer_file.read_bytes() == before


def test_preparing_again_changes_no_file(recipe):
    prepare(recipe)
    before = {file: file.stat().st_mtime_ns for file in recipe.output_dir.rglob("*")}
    prepare(recipe)
    assert {file: file.stat().st_mtime_ns for file in recipe.output_dir.rglob("*")} == before


def test_without_its_index_a_preparation_is_redone_to_the_same_bytes(recipe):
    prepare(recipe)
    expected = hashes(recipe.output_dir)
    (recipe.output_dir / "index.json").unlink()
    (recipe.output_dir / "train" / "tokens_part_00001.safetensors").write_bytes(b"half")
    (recipe.output_dir / "train" / "tokens_part_00009.safetensors.tmp").write_bytes(b"half")
    prepare(recipe)
    assert hashes(recipe.output_dir) == expected


@pytest.mark.trial
def test_tasks_in_any_order_and_twice_give_the_same_bytes(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, num_tasks=3)
    prepare(recipe)
    expected = hashes(recipe.output_dir)
    again = dataclasses.replace(recipe, output_dir=tmp_path / "again")
    for task in (2, 0, 2, 1, 0):
        prepare_task(again, task)
    finalize(again)
    assert hashes(again.output_dir) == expected


def test_the_number_of_workers_does_not_change_a_byte(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, num_tasks=3, num_workers=1)
    prepare(recipe)
    again = dataclasses.replace(recipe, num_workers=2, output_dir=tmp_path / "again")
    prepare(again)
    assert hashes(again.output_dir) == hashes(recipe.output_dir)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_a_bar_shows_how_much_is_read_and_the_tokens_per_second(recipe, monkeypatch, num_tasks):
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    monkeypatch.setattr(sys, "stderr", Terminal())
    index = prepare(dataclasses.replace(recipe, num_tasks=num_tasks, num_workers=1))
    *_, last = sys.stderr.getvalue().strip().split("\r")
    assert last.startswith("tokenizing: 100%")
    tokens = sum(index.total(split, "num_tokens") for split in index.splits)
    assert re.search(rf"{tokens / 1e6:,.1f}M tokens, [\d,]+k tokens/s\]$", last)


def test_a_finished_task_is_not_run_again(recipe, monkeypatch):
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    prepare_task(recipe, 0)
    before = hashes(recipe.output_dir)
    monkeypatch.setattr("gpt2x.preparation.tasks.open_corpus", None)
    prepare_task(recipe, 0)
    assert hashes(recipe.output_dir) == before


def test_an_unfinished_task_is_refused_by_its_number(recipe):
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    recipe = dataclasses.replace(recipe, num_tasks=3)
    prepare_task(recipe, 1)
    with pytest.raises(UserError, match=r"tasks \[0, 2\] of 3 are not finished in '.*shards'; run them first"):
        finalize(recipe)


def test_tasks_of_another_recipe_do_not_count_as_finished(recipe):
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    recipe = dataclasses.replace(recipe, num_tasks=2)
    for task in range(2):
        prepare_task(recipe, task)
    prepare_task(dataclasses.replace(recipe, tokens_per_shard=500), 0)
    with pytest.raises(UserError, match=r"tasks \[0, 1\] of 2 are not finished"):
        finalize(recipe)


def test_a_killed_preparation_is_finished_to_the_same_bytes(recipe, tmp_path):
    prepare(recipe)
    killed = dataclasses.replace(recipe, output_dir=tmp_path / "killed")
    start_and_kill(killed)
    assert not (killed.output_dir / "index.json").exists()
    prepare(killed)
    assert hashes(killed.output_dir) == hashes(recipe.output_dir)


def start_and_kill(recipe: PreparationRecipe) -> None:
    """Runs a preparation in a child process whose every write takes long, and kills it in the middle."""
    code = f"""
import time
from pathlib import PosixPath
from gpt2x.config import CorpusSection, PreparationRecipe, TokenizerSection
from gpt2x.shards import files
from gpt2x.preparation import prepare as preparation
fsync = files.os.fsync
files.os.fsync = lambda descriptor: (time.sleep(0.1), fsync(descriptor))
preparation.prepare({recipe!r})
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    while len(list(recipe.output_dir.rglob("tokens_part_*"))) < 2:
        assert child.poll() is None, "the child ended before it wrote two shards"
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def test_data_of_another_recipe_is_refused_with_what_changed(recipe, corpus):
    prepare(recipe)
    other = dataclasses.replace(recipe, corpus=dataclasses.replace(corpus, split_seed=5), tokens_per_shard=9)
    with pytest.raises(UserError, match=r"another recipe \(split_seed 0 -> 5, tokens_per_shard 2000 -> 9\); set anot"):
        prepare(other)


def test_a_tokenizer_trained_on_what_is_now_held_out_is_refused_and_its_record_says_why(recipe, corpus):
    """That of a preparation which failed for want of documents to hold out, for example."""
    other = dataclasses.replace(recipe, corpus=dataclasses.replace(corpus, validation_fraction=1e-9))
    with pytest.raises(UserError, match="none of the corpus' 61 documents falls into validation"):
        prepare(other)
    message = (
        r"was trained by another recipe \(corpus.validation_fraction 1e-09 -> 0.2\); delete that directory to train "
        r"it again, set another tokenizer.path, or use it as it is by tokenizer.vocab_size null."
    )
    with pytest.raises(UserError, match=message):
        prepare(recipe)
    shutil.rmtree(recipe.tokenizer.path)
    shutil.rmtree(recipe.output_dir)
    assert prepare(recipe).splits["validation"]


def test_a_tokenizer_that_does_not_say_what_it_was_trained_on_is_used_with_a_line(recipe, capsys):
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    record = Path(recipe.tokenizer.path, "training.json")
    record.unlink()
    capsys.readouterr()
    prepare(recipe)
    line = f"using the tokenizer in {record.parent}, which does not say what it was trained on ({record} is missing)\n"
    assert capsys.readouterr().err == line


def test_a_training_is_announced_with_its_size_and_place(recipe, capsys):
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    assert capsys.readouterr().err.startswith(f"training a tokenizer of 300 tokens into {recipe.tokenizer.path}\n")


@pytest.mark.parametrize(
    "names", [["vocab.json", "merges.txt"], ["tokenizer.model"], ["tokenizer_config.json"], ["vocab.txt"]]
)
def test_a_tokenizer_in_another_form_is_never_trained_over(recipe, names):
    directory = Path(recipe.tokenizer.path)
    directory.mkdir()
    for name in names:
        (directory / name).write_text("{}")
    before = sorted(directory.iterdir())
    with pytest.raises(UserError):
        prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    assert sorted(directory.iterdir()) == before
    assert {path.read_text() for path in before} == {"{}"}


def test_nothing_is_trained_into_what_looks_like_a_hub_id(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = dataclasses.replace(recipe.tokenizer, path="openai-community/gpt2")
    message = (
        r"tokenizer.path \(openai-community/gpt2\) looks like a Hub id, and something new would be written there; "
        r"write ./openai-community/gpt2 for a folder here, or data/gpt2."
    )
    with pytest.raises(UserError, match=message):
        prepare_tokenizer(section, recipe.corpus)
    for path in ("./openai-community/gpt2", "openai-community/other", "data/gpt2"):
        prepare_tokenizer(dataclasses.replace(section, path=path), recipe.corpus)
        assert (tmp_path / path / "tokenizer.json").is_file()


def test_a_saved_tokenizer_of_another_size_is_refused(recipe):
    prepare(recipe)
    other = dataclasses.replace(recipe.tokenizer, vocab_size=301)
    with pytest.raises(UserError, match=r"vocab_size is 301, but the tokenizer saved in '.*' has 300; set another"):
        prepare(dataclasses.replace(recipe, tokenizer=other))


def test_a_tokenizer_without_vocab_size_is_used_as_it_is(recipe, tmp_path):
    expected = prepare(recipe)
    tokenizer = TokenizerSection(path=recipe.tokenizer.path)
    index = prepare(dataclasses.replace(recipe, tokenizer=tokenizer, output_dir=tmp_path / "other"))
    assert index.splits == expected.splits


def test_a_tokenizer_that_changed_between_two_starts_is_refused(recipe, corpus):
    recipe = dataclasses.replace(recipe, num_tasks=2)
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    prepare_task(recipe, 0)
    other = dataclasses.replace(recipe.tokenizer, path=recipe.tokenizer.path + "_2", vocab_size=301)
    prepare_tokenizer(other, corpus)
    with pytest.raises(UserError, match=r"parts made with another tokenizer \(\w{8}, now \w{8}\); restore the"):
        prepare(dataclasses.replace(recipe, tokenizer=other))
    prepare(recipe)
    with pytest.raises(
        UserError, match=r"another recipe \(tokenizer_fingerprint \w+ ... \w+ -> \w+ ... \w+\); set another"
    ):
        prepare(dataclasses.replace(recipe, tokenizer=other))


@pytest.mark.parametrize("task", [-1, 3])
def test_a_task_that_does_not_exist_is_refused(recipe, task):
    with pytest.raises(UserError, match=rf"task \({task}\) must be at least 0 and below num_tasks \(3\)"):
        prepare_task(dataclasses.replace(recipe, num_tasks=3), task)


def test_finished_data_counts_whatever_the_number_of_tasks_and_fields_that_came_later(recipe):
    index = prepare(recipe)
    content = json.loads((recipe.output_dir / "index.json").read_text())
    del content["sha256"]
    for later in ("dataset", "streaming", "data_files", "document_separator", "num_tasks"):
        del content["recipe"][later]
    (recipe.output_dir / "index.json").write_text(json.dumps(content))
    assert prepare(dataclasses.replace(recipe, num_tasks=5)).splits == index.splits


@pytest.mark.trial
def test_every_task_counts_what_it_leaves_out_once(recipe, corpus_dir):
    (corpus_dir / "empty.jsonl").write_text('{"text": null}\n{"text": " "}\n{"text": "\\ud800"}\n')
    (corpus_dir / "latin.txt").write_bytes(b"caf\xe9")
    for num_tasks in (1, 3, 9):
        again = dataclasses.replace(recipe, num_tasks=num_tasks, output_dir=recipe.output_dir / str(num_tasks))
        assert prepare(again).dropped == {"empty": 2, "not UTF-8": 2}


def test_an_id_outside_the_vocabulary_is_refused_before_it_wraps(recipe, tmp_path):
    tokenizer = prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    with ShardWriter(tmp_path, Vocabulary.of(tokenizer), tokens_per_shard=9, numbers=range(9)) as writer:
        for outside in (300, 70_000, -1):
            complaint = rf"a.txt: the tokenizer gives id {outside}, outside its vocabulary of 300"
            with pytest.raises(UserError, match=complaint):
                writer.add("a.txt", np.array([5, outside]), 1)


def test_a_corpus_without_documents_is_refused(recipe, corpus_dir):
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    for file in corpus_dir.iterdir():
        file.write_text("\n")
    with pytest.raises(UserError, match=r"the corpus \(.*\) has no document but what is left out \(1 empty\); corr"):
        prepare(recipe)


@pytest.mark.parametrize(("fraction", "empty"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_a_split_that_gets_no_document_is_refused(recipe, corpus, fraction, empty):
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    corpus, tokenizer = (
        dataclasses.replace(corpus, validation_fraction=fraction),
        TokenizerSection(path=recipe.tokenizer.path),
    )
    with pytest.raises(UserError, match=rf"none of the corpus' 61 documents falls into {empty} \(validation_fraction"):
        prepare(dataclasses.replace(recipe, corpus=corpus, tokenizer=tokenizer))


def test_without_validation_everything_is_train(recipe, corpus):
    index = prepare(dataclasses.replace(recipe, corpus=dataclasses.replace(corpus, validation_fraction=0.0)))
    assert index.total("train", "num_documents") == 61
    assert not index.splits["validation"]


def test_the_statistics_say_what_was_made_and_left_out(recipe, corpus_dir):
    (corpus_dir / "empty.txt").write_text("")
    lines = statistics(prepare(recipe)).split("\n")
    assert lines[0].startswith("train: ")
    assert lines[1].startswith("validation: ")
    longest = max(int(np.diff(shard.documents).max()) for shard in load_index(recipe.output_dir).open_split("train"))
    assert lines[0].endswith(f" bytes per token, the longest document {longest} tokens")
    assert lines[2] == "left out: 1 empty"


def test_a_renewed_signature_of_an_address_is_no_other_recipe(recipe):
    tokenizer = prepare_tokenizer(recipe.tokenizer, recipe.corpus)

    def made_of(signature):
        address = f"https://reader:{signature}@host.example/rows.jsonl?part=1&X-Amz-Signature={signature}"
        corpus = CorpusSection(kind="dataset", dataset="json", data_files=[address])
        return plan_of(dataclasses.replace(recipe, corpus=corpus), tokenizer).made_of

    assert made_of("ONE") == made_of("TWO")
    assert made_of("ONE")["data_files"] == ["https://host.example/rows.jsonl?part=1"]
