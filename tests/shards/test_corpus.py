"""Documents come in a fixed order, and a document's text alone says which split it falls into."""

import dataclasses
import os
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from gpt2x.config import CorpusSection
from gpt2x.errors import UserError
from gpt2x.shards.corpus import documents, is_validation


def files(*paths: Path | str, **fields: str) -> CorpusSection:
    return CorpusSection(kind="files", paths=[str(path) for path in paths], **fields)


def test_the_standard_library_comes_without_tests_and_packages_in_the_order_of_its_names():
    names = [document.name for document in documents(CorpusSection())]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not [name for name in names if excluded & set(name.split("/"))]


def test_a_standard_library_document_is_the_file_byte_for_byte():
    document = next(document for document in documents(CorpusSection()) if document.name == "json/decoder.py")
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


def test_a_directory_is_refused_with_the_pattern_that_reads_it(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"'{tmp_path}' is a directory; name its files")):
        list(documents(files(tmp_path)))


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=r"a.pdf' must end in .txt or .jsonl"):
        list(documents(files(tmp_path / "a.pdf")))


def test_a_missing_column_is_refused_with_those_found(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"content": "x", "id": 1}\n')
    with pytest.raises(UserError, match=r"a.jsonl:2 has no field 'text', only: content, id; set corpus.text_column"):
        list(documents(files(tmp_path / "a.jsonl")))


def test_a_column_without_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": 1}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: field 'id' must hold text, not 1"):
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
