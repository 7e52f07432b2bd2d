"""Documents come in a fixed order, and a document's text alone says which split it falls into."""

import dataclasses
import gzip
import json
import os
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from gpt2x.config import CorpusSection
from gpt2x.corpus import text_files
from gpt2x.corpus.documents import Share, is_validation, open_corpus, read_pieces
from gpt2x.errors import UserError


def files(*paths: Path | str, **fields: str) -> CorpusSection:
    return CorpusSection(kind="files", paths=[str(path) for path in paths], **fields)


def documents(corpus, *, dropped=None, share=None, cuts=False):
    reading = open_corpus(corpus, lambda _: None, share=share or Share())
    return read_pieces(reading, dropped=Counter() if dropped is None else dropped, cuts=cuts)


def test_the_standard_library_comes_without_tests_and_packages_in_the_order_of_its_names():
    root = Path(sysconfig.get_path("stdlib"))
    names = [Path(document.name).relative_to(root).as_posix() for document in documents(CorpusSection())]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not [name for name in names if excluded & set(name.split("/"))]


def test_a_standard_library_document_is_the_file_byte_for_byte():
    document = next(document for document in documents(CorpusSection()) if document.name.endswith("json/decoder.py"))
    assert document.text.encode() == Path(sysconfig.get_path("stdlib"), "json/decoder.py").read_bytes()


def test_text_files_and_json_lines_are_read_in_the_order_of_patterns_and_names(tmp_path):
    (tmp_path / "b.txt").write_bytes("grün\r\n".encode())
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "z.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    read = list(documents(files(tmp_path / "z.jsonl", tmp_path / "*.txt", tmp_path / "a.txt")))
    assert [document.text for document in read] == ["one", "two", "a", "grün\r\n"]
    assert [Path(document.name).name for document in read] == ["z.jsonl:1", "z.jsonl:3", "a.txt", "b.txt"]


def test_the_order_does_not_depend_on_the_directory_listing(corpus, monkeypatch):
    expected = [document.name for document in documents(corpus)]
    scandir = os.scandir

    class Reversed:
        def __init__(self, *arguments):
            self.entries = list(scandir(*arguments))[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(os, "scandir", Reversed)
    assert [document.name for document in documents(corpus)] == expected


def test_empty_and_undecodable_documents_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\t")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_text("kept")
    (tmp_path / "d.jsonl").write_bytes(b'{"text": null}\n{"text": "\\ud800"}\n{"text": "\xff"}\n')
    dropped: Counter[str] = Counter()
    assert [document.text for document in documents(files(tmp_path / "*"), dropped=dropped)] == ["kept"]
    assert dropped == {"empty": 2, "not UTF-8": 3}


def test_a_path_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"corpus.paths: '.*none\*' matches no file; correct the path"):
        list(documents(files(tmp_path / "none*")))


def test_a_folder_stands_for_everything_readable_in_it(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "a.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b" / "d.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "b" / "picture.png").write_bytes(b"\x89")
    assert [document.text for document in documents(files(tmp_path))] == ["one", "two", "three"]


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(
        UserError,
        match=re.escape(f"the folder '{tmp_path}' holds no file of .txt, .jsonl, .json, .csv, .tsv (also .gz"),
    ):
        list(documents(files(tmp_path)))


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=r"a.pdf' is of an unknown kind; save it as one of .txt, .jsonl, .json, .csv"):
        list(documents(files(tmp_path / "a.pdf")))


def compressed(file: Path, content: bytes) -> Path:
    """Writes a file of two compressed members, as parallel compressors do."""
    codec = {".gz": gzip.compress, ".zst": lambda part: pyarrow.compress(part, "zstd", asbytes=True)}[file.suffix]
    file.write_bytes(codec(content[:9]) + codec(content[9:]))
    return file


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, suffix):
    jsonl = compressed(tmp_path / f"a.jsonl{suffix}", '{"text": "grün"}\n{"text": "two"}\n'.encode())
    text = compressed(tmp_path / f"b.txt{suffix}", b"one document\n")
    assert [document.text for document in documents(files(jsonl, text))] == ["grün", "two", "one document\n"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix, damage):
    file = compressed(tmp_path / f"a.txt{suffix}", bytes(range(65, 90)) * 99)
    content = file.read_bytes()
    file.write_bytes(content[:-9] if damage == "cut" else b"plain text, no archive")
    with pytest.raises(UserError, match=rf"a.txt{suffix}' cannot be read \(.+\); repair it or leave it out"):
        list(documents(files(file)))


def tables(directory: Path, table: pyarrow.Table) -> list[Path]:
    """A table as parquet, as an Arrow stream, which datasets writes, and as an Arrow file."""
    pyarrow.parquet.write_table(table, directory / "a.parquet", row_group_size=2)
    for name, writer in (("b.arrow", pyarrow.ipc.new_stream), ("c.arrow", pyarrow.ipc.new_file)):
        with writer(directory / name, table.schema) as opened:
            opened.write_table(table, max_chunksize=2)
    return [directory / name for name in ("a.parquet", "b.arrow", "c.arrow")]


def test_parquet_and_both_kinds_of_arrow_files_are_read_by_their_text_column(tmp_path):
    invalid = pyarrow.array([b"one", None, b"caf\xe9", b" ", b"two"]).view(pyarrow.string())
    found = tables(tmp_path, pyarrow.table({"id": range(5), "text": invalid}))
    for file in found:
        dropped: Counter[str] = Counter()
        read = list(documents(files(file), dropped=dropped))
        assert [(Path(piece.name).name, piece.text) for piece in read] == [
            (f"{file.name}:1", "one"),
            (f"{file.name}:5", "two"),
        ]
        assert dropped == {"empty": 2, "not UTF-8": 1}


def test_a_column_of_chat_messages_in_a_table_gives_their_contents(tmp_path):
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    for file in tables(tmp_path, pyarrow.table({"messages": [chat]})):
        assert [piece.text for piece in documents(files(file, text_column="messages"))] == ["Hi.\n\nHello."]


def test_a_missing_column_of_a_table_is_refused_with_those_found(tmp_path):
    for file in tables(tmp_path, pyarrow.table({"id": [1], "content": ["x"]})):
        with pytest.raises(UserError, match=rf"{file.name} has no column 'text', only: id, content; set corp"):
            list(documents(files(file)))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_that_is_none_is_refused(tmp_path, name):
    (tmp_path / name).write_text("no table at all")
    with pytest.raises(UserError, match=rf"{name}' cannot be read \(.+\); repair it or leave it out"):
        list(documents(files(tmp_path / name)))


@pytest.mark.parametrize("separator", ["<|end|>", "\n\n", "ü"])
def test_a_separator_cuts_a_text_file_into_documents_wherever_it_lies(tmp_path, separator, monkeypatch):
    generator = random.Random(0)
    texts = ["".join(generator.choices("abc \n<|é", k=generator.randrange(1, 50))) + "x" for _ in range(500)]
    (tmp_path / "a.txt").write_text(separator.join(texts) + separator)
    read = [document.text for document in documents(files(tmp_path / "a.txt", document_separator=separator))]
    assert read == [text for text in separator.join(texts).split(separator) if text.strip()]


def test_a_document_between_separators_that_is_not_utf8_is_left_out_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one;caf\xe9;;two")
    dropped: Counter[str] = Counter()
    read = documents(files(tmp_path / "a.txt", document_separator=";"), dropped=dropped)
    assert [document.text for document in read] == ["one", "two"]
    assert dropped == {"not UTF-8": 1, "empty": 1}


@pytest.mark.trial
def test_every_installed_packages_sources_are_read_and_nothing_compiled():
    corpus = CorpusSection(kind="python_packages")
    names = [row.name for row in open_corpus(corpus, lambda _: None).rows]
    assert any(name.endswith("/numpy/__init__.py") for name in names)
    assert all(name.endswith(".py") for name in names)
    assert not [name for name in names if "__pycache__" in name]


def make_dataset(directory: Path, *, num_files: int) -> CorpusSection:
    for number in range(num_files):
        rows = [{"text": f"{number} {row}"} for row in range(5)]
        (directory / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CorpusSection(kind="dataset", dataset="json", data_files=[f"{directory}/*.jsonl"])


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7])
def test_the_shares_of_a_dataset_are_the_whole_dataset_once(tmp_path, monkeypatch, streaming, num_tasks):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    corpus = dataclasses.replace(make_dataset(tmp_path, num_files=3), streaming=streaming)
    shares = [Share(task=task, num_tasks=num_tasks) for task in range(num_tasks)]
    read = [[document.text for document in documents(corpus, share=share)] for share in shares]
    expected = [f"{number} {row}" for number in range(3) for row in range(5)]
    assert sorted(text for share in read for text in share) == expected
    assert max(map(len, read)) <= 5 or num_tasks < 3
    if num_tasks == 1:
        assert read[0] == expected


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7])
def test_the_shares_of_files_are_all_files_once(tmp_path, num_tasks):
    make_dataset(tmp_path, num_files=3)
    shares = [Share(task=task, num_tasks=num_tasks) for task in range(num_tasks)]
    read = [document.text for share in shares for document in documents(files(tmp_path), share=share)]
    assert sorted(read) == [f"{number} {row}" for number in range(3) for row in range(5)]


def test_a_task_opens_only_its_own_files_where_there_are_enough(tmp_path, monkeypatch):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(str(number))
    opened, open_file = [], text_files.OpenedFile
    monkeypatch.setattr(text_files, "OpenedFile", lambda file: opened.append(file.name) or open_file(file))
    read = [piece.text for piece in documents(files(tmp_path), share=Share(task=1, num_tasks=2))]
    assert read == ["1", "3"]
    assert opened == ["1.txt", "3.txt"]


def test_a_task_parses_no_row_of_another(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nbroken\n{"text": "three"}\nbroken\n')
    read = documents(files(tmp_path), share=Share(task=0, num_tasks=2))
    assert [piece.text for piece in read] == ["one", "three"]


def test_a_missing_column_is_refused_with_those_found(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"content": "x", "id": 1}\n')
    with pytest.raises(UserError, match=r"a.jsonl:2 has no field 'text', only: content, id; set corpus.text_column"):
        list(documents(files(tmp_path / "a.jsonl")))


def test_a_column_without_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": 1}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: field 'id' must hold text or chat messages, not 1"):
        list(documents(files(tmp_path / "a.jsonl", text_column="id")))


def test_a_broken_json_line_is_refused_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(UserError, match=r"a.jsonl:2 is not JSON \(Expecting value\); a .jsonl file holds one object"):
        list(documents(files(tmp_path / "a.jsonl")))


def test_the_split_holds_out_about_the_fraction_asked_for():
    corpus = CorpusSection(validation_fraction=0.25)
    held_out = sum(is_validation(f"text {number}", corpus) for number in range(4000))
    assert 900 < held_out < 1100


def test_the_split_is_the_same_in_every_process_and_version():
    corpus = CorpusSection(validation_fraction=0.5, split_seed=7)
    expected = [True, True, False, False, False, True, True, True]
    assert [is_validation(f"text {number}", corpus) for number in range(8)] == expected


def test_another_seed_holds_out_other_documents():
    texts = [f"text {number}" for number in range(1000)]
    sides = [
        [is_validation(text, CorpusSection(validation_fraction=0.5, split_seed=s)) for text in texts] for s in (1, 2)
    ]
    agreement = sum(a == b for a, b in zip(*sides))
    assert 400 < agreement < 600


def test_a_smaller_fraction_holds_out_a_subset():
    larger, smaller = CorpusSection(validation_fraction=0.3), CorpusSection(validation_fraction=0.1)
    assert all(is_validation(str(n), larger) for n in range(1000) if is_validation(str(n), smaller))


def test_nothing_is_held_out_at_fraction_zero():
    corpus = dataclasses.replace(CorpusSection(), validation_fraction=0.0)
    assert not any(is_validation(str(number), corpus) for number in range(1000))
