"""A preparation is of the texts that it says it is of: never a token that was not asked for, none lost or repeated."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from gpt2x.config import CorpusSection
from gpt2x.corpus import dataset_rows, sources
from gpt2x.corpus import documents as reading
from gpt2x.corpus.source_files import source_files
from gpt2x.errors import UserError
from gpt2x.files import UnwritableError
from gpt2x.preparation import prepare as preparation
from gpt2x.preparation import tasks
from gpt2x.preparation.prepare import finalize, prepare, prepare_task, prepare_tokenizer
from gpt2x.shards.index import load_index

NUM_FILES = 6


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def corpus_dir(tmp_path) -> Path:
    """Six files of four documents each."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(NUM_FILES):
        write(directory / f"{number}.jsonl", [f"document {place} of file {number}" for place in range(4)])
    return directory


@pytest.fixture
def corpus(corpus_dir) -> CorpusSection:
    return CorpusSection(kind="files", paths=[f"{corpus_dir}/*.jsonl"], validation_fraction=0.3)


@pytest.fixture
def recipe(recipe):
    """One part after the other in this process; the tokenizer is there."""
    prepare_tokenizer(dataclasses.replace(recipe.tokenizer, vocab_size=270), recipe.corpus)
    tokenizer = dataclasses.replace(recipe.tokenizer, vocab_size=None)
    return dataclasses.replace(recipe, tokenizer=tokenizer, num_workers=1)


def write(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def whole_texts(directory: Path) -> Counter[str]:
    """Every document of the corpus, by a loop over its files."""
    found: Counter[str] = Counter()
    for file in directory.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            found[json.loads(line)["text"]] += 1
    return found


def prepared_texts(directory: Path) -> Counter[str]:
    """Every document of the shards, decoded one by one."""
    index, found = load_index(directory), Counter[str]()
    tokenizer = AutoTokenizer.from_pretrained(index.tokenizer_dir)
    for split in index.splits:
        for shard in index.open_split(split):
            for start, end in zip(shard.documents[:-1], shard.documents[1:]):
                found[tokenizer.decode(shard.tokens[start : end - 1].tolist())] += 1
    return found


def set_time(file: Path) -> None:
    """Another time of last change, as copying gives it."""
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


# --- finished data ---

CHANGES = {
    "changed": (lambda d: write(d / "2.jsonl", ["document 9 of file 2"] * 4), r"/2\.jsonl has changed\)"),
    "grown": (lambda d: write(d / "2.jsonl", ["a"] * 300), r"/2\.jsonl has changed\)"),
    "shrunk": (lambda d: write(d / "2.jsonl", ["a"]), r"/2\.jsonl has changed\)"),
    "more": (lambda d: write(d / "25.jsonl", ["a"]), r"/25\.jsonl is new\)"),
    "fewer": (lambda d: (d / "2.jsonl").unlink(), r"/2\.jsonl is gone\)"),
    "renamed": (lambda d: (d / "2.jsonl").rename(d / "7.jsonl"), r"/2\.jsonl is gone, .*/7\.jsonl is new\)"),
    "all": (
        lambda d: [write(file, list("abcdefgh")) for file in d.iterdir()],
        r"/0\.jsonl has changed, .*/1\.jsonl has changed, .*/2\.jsonl has changed and 3 more\)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_texts_are_refused_by_their_names(recipe, corpus_dir, change):
    prepare(recipe)
    edit, names = CHANGES[change]
    edit(corpus_dir)
    date = r"\d{4}-\d\d-\d\d"
    message = rf"shards' was prepared on {date} from other texts \(.*{names}; set another output_dir, or delete that"
    with pytest.raises(UserError, match=message):
        prepare(recipe)
    with pytest.raises(UserError, match=message):
        prepare_task(recipe, 0)
    prepare(dataclasses.replace(recipe, output_dir=recipe.output_dir / "other"))
    assert prepared_texts(recipe.output_dir / "other") == whole_texts(corpus_dir)


def test_a_change_that_keeps_size_and_time_of_a_file_is_not_looked_for(recipe, corpus_dir):
    """What the docstring of gpt2x.corpus.sources says."""
    prepare(recipe)
    file, times = corpus_dir / "2.jsonl", (corpus_dir / "2.jsonl").stat()
    file.write_text(file.read_text().replace("document 3", "document 8"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepare(recipe)


def test_the_same_bytes_with_other_times_are_the_same_texts(recipe, corpus_dir, capsys, monkeypatch):
    prepare(recipe)
    for file in corpus_dir.iterdir():
        set_time(file)
    prepare(recipe)
    printed, said = capsys.readouterr()
    assert "already prepared on" in printed
    assert said.startswith("reading 6 files of the corpus, whose times have changed, to see whether their content")
    monkeypatch.setattr(sources, "sha256_of", None)  # the answer is known
    prepare(recipe)


def test_a_change_of_the_same_size_is_found_by_the_sha256(recipe, corpus_dir):
    prepare(recipe)
    file = corpus_dir / "2.jsonl"
    file.write_text(file.read_text().replace("document 3", "document 8"))
    set_time(file)
    with pytest.raises(UserError, match=r"from other texts \(.*/2\.jsonl has changed\)"):
        prepare(recipe)


def test_that_shards_are_taken_as_they_are_is_said(recipe, capsys):
    index = prepare(recipe)
    assert capsys.readouterr().out == ""
    assert prepare(recipe) == index
    num_tokens = sum(index.total(split, "num_tokens") for split in index.splits)
    date = sources.date_of(recipe.output_dir / "index.json")
    line = f"{recipe.output_dir}: already prepared on {date} from 6 files ({num_tokens:,} tokens)\n"
    assert capsys.readouterr().out == line


def test_shards_whose_texts_are_not_here_are_taken_with_a_line(recipe, corpus_dir, tmp_path, capsys):
    index = prepare(recipe)
    shutil.rmtree(corpus_dir)
    shutil.rmtree(recipe.tokenizer.path)
    recipe = dataclasses.replace(recipe, tokenizer=dataclasses.replace(recipe.tokenizer, vocab_size=270))
    assert prepare(recipe) == index
    assert capsys.readouterr().out.endswith("tokens); the texts are not on this machine, and not compared\n")


def test_one_pattern_of_two_that_matches_nothing_any_more_is_a_difference(recipe, corpus, corpus_dir):
    paths = [f"{corpus_dir}/[012].jsonl", f"{corpus_dir}/[345].jsonl"]
    recipe = dataclasses.replace(recipe, corpus=dataclasses.replace(corpus, paths=paths))
    prepare(recipe)
    for number in (3, 4, 5):
        (corpus_dir / f"{number}.jsonl").unlink()
    with pytest.raises(UserError, match=r"/3\.jsonl is gone, .*/4\.jsonl is gone, .*/5\.jsonl is gone\)"):
        prepare(recipe)


@pytest.mark.parametrize("content", [None, "", "{", '{"files": 3}', '{"made_of": {}, "tokenizer": "t", "files": [7]}'])
def test_data_of_earlier_versions_and_damaged_records_are_taken_with_a_line(recipe, corpus_dir, capsys, content):
    index = prepare(recipe)
    (recipe.output_dir / "sources.json").unlink()
    if content is not None:
        (recipe.output_dir / "sources.json").write_text(content)
    write(corpus_dir / "9.jsonl", ["a"])
    assert prepare(recipe) == index
    assert capsys.readouterr().out.endswith("tokens); of what is not recorded, so the texts are not compared\n")


def test_the_record_names_files_alike_wherever_python_is_installed(tmp_path, monkeypatch):
    for place in ("a", "b/c"):
        library = tmp_path / place
        (library / "json" / "__pycache__").mkdir(parents=True)
        (library / "json" / "decoder.py").write_text("")
        (library / "abc.py").write_text("")
        (library / "json" / "__pycache__" / "decoder.py").write_text("")
        monkeypatch.setattr("sysconfig.get_path", lambda name, library=library: str(library))
        for kind in ("python_stdlib", "python_packages"):
            found = source_files(CorpusSection(kind=kind))
            assert found == {"abc.py": library / "abc.py", "json/decoder.py": library / "json" / "decoder.py"}


def test_a_file_whose_name_is_not_utf_8_is_recorded(recipe, corpus_dir):
    (corpus_dir / "2.jsonl").rename(os.fsdecode(os.fsencode(corpus_dir) + b"/\xff.jsonl"))
    index = prepare(recipe)
    assert prepared_texts(recipe.output_dir) == whole_texts(corpus_dir)
    assert prepare(recipe) == index
    assert any(file["name"].endswith(r"/\xff.jsonl") for file in sources.read_record(recipe.output_dir)["files"])


def test_local_files_of_a_dataset_are_compared(recipe, corpus_dir, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    corpus = CorpusSection(
        kind="dataset", dataset="json", data_files=[f"{corpus_dir}/*.jsonl"], validation_fraction=0.3
    )
    recipe = dataclasses.replace(recipe, corpus=corpus)
    prepare(recipe)
    assert prepared_texts(recipe.output_dir) == whole_texts(corpus_dir)
    write(corpus_dir / "9.jsonl", ["a"])
    with pytest.raises(UserError, match=r"from other texts \(.*/9\.jsonl is new\)"):
        prepare(recipe)


def test_all_parts_read_a_dataset_of_the_hub_at_the_commit_of_the_first(recipe, corpus_dir, monkeypatch, tmp_path):
    """Somebody pushes while a cluster prepares; the Hub is a folder for each commit."""
    shutil.copytree(corpus_dir, tmp_path / "commits" / "abc1")
    shutil.copytree(corpus_dir, tmp_path / "commits" / "abc2")
    write(tmp_path / "commits" / "abc2" / "9.jsonl", ["pushed later"])
    newest, load = SimpleNamespace(sha="abc1"), dataset_rows.load_dataset

    def load_commit(_dataset, *, revision, data_files, **options):
        return load("json", data_files=f"{tmp_path}/commits/{revision or newest.sha}/*.jsonl", **options)

    monkeypatch.setattr(dataset_rows, "load_dataset", load_commit)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: newest)
    corpus = CorpusSection(kind="dataset", dataset="team/texts", validation_fraction=0.3)
    recipe = dataclasses.replace(recipe, corpus=corpus, num_tasks=2)
    prepare_task(recipe, 1)
    newest.sha = "abc2"
    prepare(recipe)
    assert prepared_texts(recipe.output_dir) == whole_texts(corpus_dir)
    assert sources.read_record(recipe.output_dir)["revision"] == "abc1"


# --- data that are being prepared ---


@pytest.mark.parametrize("num_tasks", [3, 9])
@pytest.mark.parametrize("change", ["changed", "grown", "shrunk", "more", "fewer", "renamed"])
def test_texts_that_change_between_two_parts_are_refused(recipe, corpus_dir, change, num_tasks):
    recipe = dataclasses.replace(recipe, num_tasks=num_tasks)
    first = 2  # reads 2.jsonl, whether files or rows are dealt out
    prepare_task(recipe, first)
    before = {file: file.read_bytes() for file in corpus_dir.iterdir()}
    edit, names = CHANGES[change]
    edit(corpus_dir)
    message = rf"'.*shards' holds parts made of other texts \(.*{names}; restore them, set another output_dir, or"
    for run in (lambda: prepare(recipe), lambda: prepare_task(recipe, 1), lambda: finalize(recipe)):
        with pytest.raises(UserError, match=message):
            run()
    for file in corpus_dir.iterdir():
        file.unlink()
    for file, content in before.items():  # restored, at another time
        file.write_bytes(content)
    if num_tasks == 9:  # each part reads all files, and 0.jsonl's sha256 is not known yet
        shutil.rmtree(recipe.output_dir)
    prepare(recipe)
    assert prepared_texts(recipe.output_dir) == whole_texts(corpus_dir)


def test_a_file_that_appears_before_a_part_is_finished_is_prepared_with_the_others(recipe, corpus_dir, monkeypatch):
    recipe = dataclasses.replace(recipe, num_tasks=3)
    monkeypatch.setattr(tasks, "record_task", stop)
    with pytest.raises(InterruptedError):
        prepare(recipe)
    monkeypatch.undo()
    write(corpus_dir / "15.jsonl", ["the new one"])
    prepare(recipe)
    assert prepared_texts(recipe.output_dir) == whole_texts(corpus_dir)


def stop(*arguments):
    raise InterruptedError


def test_a_part_that_was_at_work_when_the_plan_was_made_anew_does_not_count(recipe, corpus_dir, monkeypatch):
    """The slow task 0 has read the files of before; task 1 starts after one more has appeared."""
    recipe, record = dataclasses.replace(recipe, num_tasks=2), tasks.record_task

    def appear_and_record(plan, task, content):
        monkeypatch.setattr(tasks, "record_task", record)
        write(corpus_dir / "15.jsonl", ["the new one"])
        prepare_task(recipe, 1)
        record(plan, task, content)

    monkeypatch.setattr(tasks, "record_task", appear_and_record)
    prepare_task(recipe, 0)
    with pytest.raises(UserError, match=r"tasks \[0\] of 2 are not finished"):
        finalize(recipe)
    prepare(recipe)
    assert prepared_texts(recipe.output_dir) == whole_texts(corpus_dir)


def test_a_file_that_changes_while_it_is_read_is_refused_by_its_name(recipe, corpus_dir, monkeypatch):
    rows_of = reading.rows_of

    def growing(file, *arguments, **options):
        yield from rows_of(file, *arguments, **options)
        if file.name == "3.jsonl":
            with file.open("a") as stream:
                stream.write(json.dumps({"text": "one more"}) + "\n")

    monkeypatch.setattr(reading, "rows_of", growing)
    with pytest.raises(UserError, match=r"corpus: '.*/3\.jsonl' has changed while it was read; start the same comm"):
        prepare(recipe)
    monkeypatch.undo()
    prepare(recipe)
    assert prepared_texts(recipe.output_dir) == whole_texts(corpus_dir)


def test_a_source_that_is_no_regular_file_is_refused_at_once(recipe, corpus_dir):
    os.mkfifo(corpus_dir / "8.jsonl")
    with pytest.raises(UserError, match=r"corpus: '.*/8\.jsonl' is no regular file; leave it out"):
        prepare(recipe)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"made_of": {}}', "fifo"])
def test_a_damaged_record_of_a_part_means_that_it_is_made_again(recipe, corpus_dir, content):
    recipe = dataclasses.replace(recipe, num_tasks=2)
    prepare_task(recipe, 0)
    record = recipe.output_dir / "tasks" / "task_00000.json"
    if content == "fifo":
        record.unlink()
        os.mkfifo(record)
    else:
        record.write_text(content)
    prepare(recipe)
    assert prepared_texts(recipe.output_dir) == whole_texts(corpus_dir)


# --- two at a time ---

PREPARE = """
import sys
sys.path.insert(0, {root!r})
from pathlib import PosixPath
from gpt2x.config import CorpusSection, PreparationRecipe, TokenizerSection
from gpt2x.preparation import prepare as preparation
sys.stdin.readline()
preparation.prepare({recipe!r})
"""


def test_of_two_that_prepare_the_same_the_second_finds_it_done(recipe, corpus_dir):
    shutil.rmtree(recipe.tokenizer.path)
    recipe = dataclasses.replace(recipe, tokenizer=dataclasses.replace(recipe.tokenizer, vocab_size=270))
    code = PREPARE.format(root=str(Path(__file__).parents[2]), recipe=recipe)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    for process in pair:
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    assert sum("already prepared on" in printed for printed, _ in ends) == 1
    assert prepared_texts(recipe.output_dir) == whole_texts(corpus_dir)
    assert {path.name for path in recipe.output_dir.iterdir()} == {
        *("index.json", "sources.json", "tokenizer", "train", "validation"),
    }


def test_the_second_waits_and_says_for_whom(recipe, monkeypatch, capfd):
    """The first holds the directory until the second has said that it waits."""
    monkeypatch.setattr("gpt2x.files.SILENT_S", 0.05)
    said, finish = threading.Event(), preparation._finalize
    results = []

    def finish_late(plan):
        second.start()
        assert said.wait(20)
        return finish(plan)

    def print_and_tell(*words, **options):
        said.set()
        print(*words, **options)

    monkeypatch.setattr("gpt2x.files.print", print_and_tell, raising=False)
    monkeypatch.setattr(preparation, "_finalize", finish_late)
    second = threading.Thread(target=lambda: results.append(prepare(recipe)))
    first = prepare(recipe)
    second.join(20)
    assert results == [first]
    assert f"waiting for process {os.getpid()} on " in capfd.readouterr().err


# --- what a crash leaves ---


def test_tokenizer_and_sources_are_there_before_the_index_and_the_records_until_after_it(recipe, monkeypatch):
    monkeypatch.setattr(preparation, "write_index", stop)
    with pytest.raises(InterruptedError):
        prepare(recipe)
    assert json.loads((recipe.output_dir / "tokenizer" / "tokenizer.json").read_text())["version"] == "1.0"
    record = sources.read_record(recipe.output_dir)
    assert [file["name"] for file in record["files"]] == sorted(source_files(recipe.corpus))
    for file in record["files"]:
        assert file["sha256"] == hashlib.sha256(Path(file["name"]).read_bytes()).hexdigest()
    assert (recipe.output_dir / "tasks" / "task_00000.json").is_file()
    monkeypatch.undo()
    monkeypatch.setattr(tasks, "open_corpus", None)  # nothing is read again
    prepare(recipe)
    assert not (recipe.output_dir / "tasks").exists()


@pytest.mark.parametrize("call", range(0, 14, 2))
def test_a_full_disk_is_one_line_and_the_same_command_ends_in_the_same_bytes(recipe, tmp_path, monkeypatch, call):
    expected = dataclasses.replace(recipe, output_dir=tmp_path / "expected")
    prepare(expected)
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > call:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnwritableError, match=r"could not be written \(No space left on device\); mend that"):
        prepare(recipe)
    monkeypatch.undo()
    prepare(recipe)
    assert contents(recipe.output_dir) == contents(expected.output_dir)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
