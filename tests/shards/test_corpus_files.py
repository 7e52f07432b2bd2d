"""Files of every kind are read as other readers read them, each once; what is not read is said."""

import codecs
import csv
import glob
import gzip
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import load_dataset

from gpt2x.config import CorpusSection
from gpt2x.corpus import file_rows, tables, text_files
from gpt2x.corpus.documents import Share, open_corpus, read_pieces
from gpt2x.corpus.source_files import matching_files, passed_over, source_files
from gpt2x.errors import UserError


def files(*paths: Path | str, **fields) -> CorpusSection:
    return CorpusSection(kind="files", paths=[str(path) for path in paths], **fields)


def read(corpus, *, dropped=None, share=None, cuts=False):
    reading = open_corpus(corpus, lambda _: None, share=share or Share())
    return list(read_pieces(reading, dropped=Counter() if dropped is None else dropped, cuts=cuts))


def texts(corpus, **options) -> list[str]:
    return [piece.text for piece in read(corpus, **options)]


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


# --- csv and tsv -----------------------------------------------------------------------------------------------------

CELLS = [
    "plain",
    "NA",
    "null",
    "007",
    "1e5",
    "2020-01-01",
    "True",
    "a,b",
    "a\tb",
    'say "hi"',
    "two\nlines",
    "grün 中",
    "x",
]


def table(file: Path, rows: list[list[str]], delimiter: str, line_end: str) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream, delimiter=delimiter, lineterminator=line_end).writerows(rows)
    return file


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".CSV", ",")])
def test_a_table_of_text_gives_the_texts_that_pandas_reads_without_guessing(tmp_path, suffix, delimiter, line_end):
    generator = random.Random(0)
    rows = [[str(number), *generator.choices(CELLS, k=2)] for number in range(200)]
    file = table(tmp_path / f"a{suffix}", [["id", "text", "n"], *rows], delimiter, line_end)
    expected = pandas.read_csv(file, sep=delimiter, dtype=str, keep_default_na=False)["text"].tolist()
    assert texts(files(file)) == expected == [row[1] for row in rows]


def test_a_compressed_table_with_a_byte_order_mark_has_its_first_column(tmp_path):
    file = write(tmp_path / "a.csv.gz", gzip.compress('\ufefftext,n\n a b ,1\n\n"x\ny",2\n'.encode()))
    assert [(Path(piece.name).name, piece.text) for piece in read(files(file))] == [
        ("a.csv.gz:2", " a b "),
        ("a.csv.gz:4", "x\ny"),
    ]


def test_rows_of_a_table_that_are_empty_or_not_utf8_are_left_out_and_counted(tmp_path):
    file = write(tmp_path / "a.csv", b"text,n\n,1\ncaf\xe9,2\nok,caf\xe9\n  ,3\n")
    dropped: Counter[str] = Counter()
    assert texts(files(file), dropped=dropped) == ["ok"]
    assert dropped == {"empty": 2, "not UTF-8": 1}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("text,n\na,1\nb,2,3\n", r"a.csv:3 has 3 cells, and there are 2 columns; correct the row, or quote"),
        ("text,n\n\"a\n\",1\nb\n", r"a.csv:4 has 1 cells, and there are 2 columns; correct the row, or quote"),
        ('text,n\n"a"b,1\n', r"a.csv:2 is no CSV \(.* expected after .*\); double the quotes inside of quotes"),
        ('text,n\n"a,1\n', r"a.csv:2 is no CSV \(unexpected end of data\); double the quotes inside of quotes"),
        ("text,text\na,1\n", r"a.csv has 2 columns 'text'; rename all but one"),
        ("body,n\na,1\n", r"a.csv:2 has no field 'text', only: body, n; set corpus.text_column to one of them"),
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_refused_with_the_line(tmp_path, content, complaint):
    with pytest.raises(UserError, match=complaint):
        read(files(write(tmp_path / "a.csv", content)))


# --- json ------------------------------------------------------------------------------------------------------------

OBJECTS = [
    {"id": number, "text": text} for number, text in enumerate(['{"a": [1, "]"]}', "two\n lines", 'ü \\ "x"', "z"])
]


@pytest.mark.parametrize("per_read", [1, 7, 2**18])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(OBJECTS),
        "\ufeff \n" + json.dumps(OBJECTS, indent=2, ensure_ascii=False) + "\n",
        "\n".join(map(json.dumps, OBJECTS)),
    ],
    ids=["array", "indented array", "lines"],
)
def test_a_json_file_gives_what_datasets_reads(tmp_path, monkeypatch, content, per_read):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(file_rows, "CHARACTERS_PER_READ", per_read)
    file = write(tmp_path / "a.json", content)
    plain = write(tmp_path / "plain.json", content.removeprefix("\ufeff \n"))  # datasets sees no array behind a blank
    expected = [row["text"] for row in load_dataset("json", data_files=[str(plain)], split="train", streaming=True)]
    assert texts(files(file)) == expected == [row["text"] for row in OBJECTS]
    assert [Path(piece.name).name for piece in read(files(file))] == [f"a.json:{number}" for number in (1, 2, 3, 4)]


def test_objects_over_several_lines_one_after_the_other_are_rows_too(tmp_path):
    content = "\n".join(json.dumps(row, indent=1) for row in OBJECTS)
    assert texts(files(write(tmp_path / "a.JSON.gz", gzip.compress(content.encode())))) == [
        row["text"] for row in OBJECTS
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('[{"text": "a"}, {"text": }]', r"a.json:2 is not JSON \(Expecting value\); repair it or leave it out"),
        ('[{"text": "a"}, {"text": "b"', r"a.json:2 is not JSON \(Expecting ',' delimiter\); repair it or leave"),
        ('[{"text": "a"},', r"a.json' ends before its array does, after 1 objects; repair it"),
        ('[{"text": "a"}] {"text": "b"}', r"a.json' goes on behind the end of its array; give one array or ob"),
        ('["a"]', r"a.json:1 is no JSON object but begins with '\"a\"\]'; a .json file holds objects, in an array or"),
        ('{"body": "a"}', r"a.json:1 has no field 'text', only: body; set corpus.text_column to one of them"),
    ],
)  # fmt: skip
def test_a_json_file_that_is_none_is_refused(tmp_path, content, complaint):
    with pytest.raises(UserError, match=complaint):
        read(files(write(tmp_path / "a.json", content)))


def test_a_text_in_a_json_file_that_is_not_utf8_is_left_out_alone(tmp_path):
    dropped: Counter[str] = Counter()
    file = write(tmp_path / "a.json", b'[{"text": "caf\xe9"}, {"text": "ok", "n": "caf\xe9"}]')
    assert texts(files(file), dropped=dropped) == ["ok"]
    assert dropped == {"not UTF-8": 1}


# --- conversations ---------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4, NA"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([{"messages": TURNS}], indent=2)),
        ("a.json", json.dumps({"conversations": TURNS})),
        ("a.csv", 'prompt,completion\n2+2?,"4, NA"\n'),
        ("a.tsv", "\ufeffquestion\tanswer\n2+2?\t4, NA\n"),
        ("a.csv", 'instruction,input,output,n\n2+2?,,"4, NA",1\n'),
    ],
)
def test_conversations_are_read_from_them_too(tmp_path, name, content):
    corpus = files(write(tmp_path / name, content))
    reading = open_corpus(corpus, lambda _: None, as_chat=True)
    assert [chat.messages for chat in read_pieces(reading, dropped=Counter(), cuts=False)] == [TURNS]


# --- byte order marks and other encodings ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_byte_order_mark_is_passed_over(tmp_path, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": lambda part: pyarrow.compress(part, "zstd", asbytes=True)}[suffix]
    mark = codecs.BOM_UTF8
    write(tmp_path / f"a.txt{suffix}", pack(mark + b"one"))
    write(tmp_path / f"b.jsonl{suffix}", pack(mark + b'{"text": "two"}\n'))
    write(tmp_path / f"c.json{suffix}", pack(mark + b'[{"text": "three"}]'))
    write(tmp_path / f"d.tsv{suffix}", pack(mark + b"text\nfour\n"))
    assert texts(files(tmp_path)) == ["one", "two", "three", "four"]
    assert texts(files(tmp_path / f"a.txt{suffix}", document_separator="n")) == ["o", "e"]


def test_a_long_file_with_a_byte_order_mark_is_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONG_FILE_BYTES", 10)
    text = "longer than that, ü\r\n" * 3
    assert "".join(texts(files(write(tmp_path / "a.txt", "\ufeff" + text)), cuts=True)) == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv.gz"])
def test_utf_16_is_refused_by_its_name_with_the_remedy(tmp_path, encoding, name):
    content = ("\ufeff" + '{"text": "x"}\n').encode(encoding)
    file = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    wide = encoding[:6].upper()
    complaint = f"^'{file}' is in {wide}; save it as UTF-8: iconv -f {wide} -t UTF-8 FILE > NEW.$"
    with pytest.raises(UserError, match=complaint):
        read(files(file))


def test_what_utf_16_is_read_as_otherwise_is_no_text(tmp_path):
    expected = "ü, \U0001f642\n"
    assert Path(write(tmp_path / "a.txt", ("\ufeff" + expected).encode("utf-16-le"))).read_text("utf-16") == expected


# --- which files -----------------------------------------------------------------------------------------------------


def test_a_path_that_exists_is_that_path(tmp_path):
    one = write(tmp_path / "[set] a" / "x [1].jsonl", '{"text": "one"}\n')
    write(tmp_path / "[set] a" / "x 1.jsonl", '{"text": "other"}\n')
    assert texts(files(one)) == ["one"]
    assert texts(files(tmp_path / "[set] a")) == ["other", "one"]
    assert texts(files(tmp_path / "*" / "x ?.jsonl")) == ["other"]


def test_endings_are_known_in_capitals_too(tmp_path):
    write(tmp_path / "a.JSONL", '{"text": "one"}\n')
    write(tmp_path / "b.Txt", "two")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three"]}), tmp_path / "c.PARQUET")
    assert texts(files(tmp_path)) == ["one", "two", "three"]


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    write(tmp_path / "c" / "one.txt", "one")
    write(tmp_path / "c" / "deep" / "two.txt", "two")
    (tmp_path / "c" / "deep" / "up").symlink_to(tmp_path / "c")
    (tmp_path / "c" / "again.txt").symlink_to(tmp_path / "c" / "one.txt")
    (tmp_path / "c" / "a-deep").symlink_to(tmp_path / "c" / "deep")
    (tmp_path / "c" / "dangling.txt").symlink_to(tmp_path / "nowhere")
    assert sorted(texts(files(tmp_path / "c"))) == ["one", "two"]
    assert sorted(texts(files(tmp_path / "c", tmp_path / "c" / "**" / "*.txt", tmp_path / "c" / "deep"))) == [
        "one",
        "two",
    ]


@pytest.fixture
def entangled(tmp_path):
    """Two folders, each with links to itself, to the other and to the one above; 2 ** 40 paths lead through them."""
    for name, other in ("ab", "ba"):
        write(tmp_path / "c" / name / f"{name}.jsonl", json.dumps({"text": name}))
        for link, target in {"self": name, "other": other, "up": "."}.items():
            (tmp_path / "c" / name / link).symlink_to(tmp_path / "c" / target)
    return tmp_path / "c"


def test_folders_that_link_to_each_other_are_read_once(entangled):
    for paths in ([entangled], [entangled / "a"], [entangled / "a", entangled / "b"], [entangled / "**" / "*.jsonl"]):
        assert sorted(texts(files(*paths))) == ["a", "b"]


def test_the_files_of_a_dataset_in_such_folders_are_found_once(entangled):
    directory = CorpusSection(kind="dataset", dataset=str(entangled))
    pattern = CorpusSection(kind="dataset", dataset="json", data_files=[f"{entangled}/**/*.jsonl"])
    expected = [entangled / name / f"{name}.jsonl" for name in "ab"]
    assert [list(source_files(corpus).values()) for corpus in (directory, pattern)] == [expected, expected]


def test_what_links_lead_to_outside_of_the_folder_is_read(tmp_path):
    write(tmp_path / "out" / "a.txt", "outside")
    write(tmp_path / "c" / "b.txt", "inside")
    (tmp_path / "c" / "link").symlink_to(tmp_path / "out")
    assert texts(files(tmp_path / "c")) == ["inside", "outside"]
    assert [file.relative_to(tmp_path).as_posix() for file in matching_files([str(tmp_path / "c")])] == [
        "c/b.txt",
        "c/link/a.txt",
    ]


def test_the_order_is_that_of_the_paths_as_it_always_was(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.txt", "a/b/c.txt", "a-b/x.txt", ".hidden/x.txt", "a/.x.txt"):
        write(tmp_path / name, name)
    expected = sorted(path for path in tmp_path.glob("**/*.txt") if "/." not in str(path))
    assert matching_files([str(tmp_path)]) == expected


def test_what_a_folder_holds_and_is_not_read_is_said(tmp_path):
    for name in ("a.txt", "b.png", "d/c.PNG", "d/e.pdf", "d/README"):
        write(tmp_path / name, "x")
    expected = "corpus.paths: files of other kinds are passed over: 2 .png, 1 .pdf, 1 without ending"
    said = passed_over([str(tmp_path), str(tmp_path / "d"), str(tmp_path / "a.txt")])
    assert sorted(re.split(", |: ", said)) == sorted(re.split(", |: ", expected))
    assert passed_over([str(tmp_path / "a.txt")]) is None


def test_a_column_of_nothing_is_counted(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3), "n": [1, 2, 3]}), tmp_path / "a.parquet")
    dropped: Counter[str] = Counter()
    assert texts(files(tmp_path), dropped=dropped) == []
    assert dropped == {"empty": 3}


# --- long rows -------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_most_100(monkeypatch):
    for module in (file_rows, text_files, tables):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(file_rows, "CHARACTERS_PER_READ", 20)
    before = csv.field_size_limit()
    yield
    csv.field_size_limit(before)


def write_rows(file, rows):
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), file)
    elif file.suffix == ".csv":
        write(file, "text\n" + "".join(f'"{row}"\n' for row in rows))
    else:
        write(file, "".join(json.dumps({"text": row}) + "\n" for row in rows))
    return files(file)


@pytest.mark.parametrize(
    ("name", "number"), [("a.jsonl", 9), ("a.json", 9), ("a.csv", 10), ("a.parquet", 9), ("lines.csv", 30)]
)
@pytest.mark.usefixtures("at_most_100")
def test_a_row_that_is_too_long_to_be_held_is_refused_by_its_name(tmp_path, name, number):
    rows = [*"abcdefgh", "four\n" * 40 if name == "lines.csv" else "y" * 200]
    with pytest.raises(
        UserError, match=rf"{name}:{number} has more than 100 bytes; cut it into several, or give the t"
    ):
        read(write_rows(tmp_path / name, rows))


@pytest.mark.usefixtures("at_most_100")
def test_a_table_of_long_rows_is_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_encoded", None)
    with pytest.raises(UserError, match=r"^a row of '.*a.parquet' has more than 100 bytes; cut it"):
        read(write_rows(tmp_path / "a.parquet", ["x" * 200]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
@pytest.mark.usefixtures("at_most_100")
def test_a_row_that_can_just_be_held_is_read(tmp_path, name):
    rows = ["y" * 85, "z" * 80, *"abcdefgh"]
    assert texts(write_rows(tmp_path / name, rows)) == rows


@pytest.mark.parametrize("cuts", [True, False])
def test_a_long_document_between_separators_is_that_document(tmp_path, monkeypatch, cuts):
    monkeypatch.setattr(text_files, "LONG_FILE_BYTES", 2**20)
    documents = ["short", "ü" * 1_500_000, "x\n" * 900_000, "", "word " * 300_000, "end"]
    file = write(tmp_path / "a.txt", "<|end|>".join(documents))
    pieces = read(files(file, document_separator="<|end|>"), cuts=cuts)
    found: dict[str, str] = {}
    for piece in pieces:
        found[piece.name] = found.get(piece.name, "") + piece.text
    assert list(found.values()) == [document for document in documents if document]
    assert [Path(name).name for name in found] == [f"a.txt:{number}" for number in (1, 2, 3, 5, 6)]


def test_long_rows_of_a_table_come_in_smaller_batches(tmp_path, monkeypatch):
    long = pyarrow.table({"text": ["x" * 1000 for _ in range(300)], "n": range(300)})
    pyarrow.parquet.write_table(long, tmp_path / "a.parquet", use_dictionary=False)
    batches = []
    iterate = pyarrow.parquet.ParquetFile.iter_batches

    def remember(table, batch_size, **options):
        batches.append(batch_size)
        return iterate(table, batch_size=batch_size, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", remember)
    monkeypatch.setattr("gpt2x.corpus.tables.BYTES_PER_BATCH", 10_000)
    assert texts(files(tmp_path)) == ["x" * 1000] * 300
    monkeypatch.setattr("gpt2x.corpus.tables.BYTES_PER_BATCH", 10)
    assert len(texts(files(tmp_path))) == 300
    assert 5 <= batches[0] <= 10
    assert batches[1] == 1


def test_a_relative_path_is_of_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "here")
    monkeypatch.chdir(tmp_path)
    assert texts(files("a.txt", os.path.join(".", "a.txt"))) == ["here"]


def test_patterns_match_what_glob_matches(tmp_path):
    for name in (
        "a.txt",
        "b/c.txt",
        "b/c/d.txt",
        "b/c/e.json",
        "b-x/f.txt",
        "b/.h/g.txt",
        "z [1]/i.txt",
        "b/c/txt/k.txt",
    ):
        write(tmp_path / name, name)
    for pattern in (
        "**/*.txt",
        "b/**/*.txt",
        "**/c/*.txt",
        "*/**/*.txt",
        "**/c/**/*.txt",
        "b/**/c/**/d.txt",
        "*/*.txt",
    ):
        expected = sorted(glob.glob(str(tmp_path / pattern), recursive=True))
        assert [str(file) for file in matching_files([str(tmp_path / pattern)])] == expected, pattern
    assert matching_files([str(tmp_path / "**" / "txt")]) == [tmp_path / "b/c/txt/k.txt"]


def test_a_relative_pattern_is_of_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "b" / "c.txt", "x")
    monkeypatch.chdir(tmp_path)
    assert matching_files(["**/*.txt"]) == [Path("b/c.txt")]
