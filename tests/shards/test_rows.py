"""A dataset's rows are opened by its recipe, and what a user gets wrong there is said in one line."""

import datetime
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from gpt2x.config import CorpusSection
from gpt2x.corpus.dataset_rows import open_rows
from gpt2x.corpus.rows import text_of
from gpt2x.errors import UserError

CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!\n"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def parquet(tmp_path):
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), file)
    return str(file)


def dataset(builder: str, *files: str, **fields) -> CorpusSection:
    return CorpusSection(kind="dataset", dataset=builder, data_files=list(files), **fields)


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_come_in_the_order_of_the_file(parquet, streaming):
    rows = open_rows(dataset("parquet", parquet, streaming=streaming))
    assert [row["text"] for row in rows] == ["one", None, "two"]


def test_a_column_of_chat_messages_comes_as_its_messages(tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    rows = open_rows(dataset("json", str(tmp_path / "chat.jsonl"), text_column="messages"))
    assert text_of(next(iter(rows))["messages"], name="row 0", column="messages") == ("Hi.\n\nHello!\n", None)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_missing_column_of_a_dataset_is_refused_with_those_found(parquet, streaming):
    with pytest.raises(UserError, match=r"\(parquet\) has no column 'content', only: text, id; set corpus.text_colum"):
        open_rows(dataset("parquet", parquet, streaming=streaming, text_column="content"))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_missing_split_is_refused_with_those_found(parquet, streaming):
    with pytest.raises(UserError, match=r"cannot be read: .*['\"]?test['\"]?.*\['train'\]; correct corpus.dataset"):
        open_rows(dataset("parquet", parquet, streaming=streaming, dataset_split="test"))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\(json\) cannot be read: Unable to find '.*none.jsonl'; correct"):
        open_rows(dataset("json", str(tmp_path / "none.jsonl")))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\) cannot be read: Couldn't find any data file at .*; correct"):
        open_rows(dataset(str(tmp_path / "nowhere")))


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"cannot be read: Parquet magic bytes not found.*; correct corpus.dataset"):
        open_rows(dataset("parquet", str(tmp_path / "a.parquet"), streaming=False))


def test_a_builder_without_files_is_refused_before_it_reads_the_current_directory():
    with pytest.raises(UserError, match=r"corpus.dataset \(json\) reads files; name them in corpus.data_files"):
        open_rows(dataset("json"))


def test_what_cannot_be_reached_is_no_mistake_of_the_user():
    with pytest.raises(ConnectionError):
        open_rows(dataset("nobody/nothing"))


@pytest.mark.parametrize("value", [None, "", " \n\u3000", [], [{"role": "user", "content": None}]])
def test_empty_rows_are_left_out(value):
    assert text_of(value, name="row 0", column="text") == ("", "empty")


def test_rows_with_lone_surrogates_are_left_out():
    assert text_of("a\ud800", name="row 0", column="text") == ("", "not UTF-8")


@pytest.mark.parametrize("text", ["grün", " a\r\n", "\ufeffa\x00"])
def test_a_text_stays_what_it_is(text):
    assert text_of(text, name="row 0", column="text") == (text, None)


@pytest.mark.parametrize("value", [1, {"a": 1}, ["a"], [CHAT], [{"content": 1}], datetime.date(2020, 1, 1)])
def test_what_is_no_text_is_refused_with_its_row(value):
    shown = re.escape(repr(value)[:30])
    with pytest.raises(UserError, match=rf"^a.jsonl:7: field 'x' must hold text or chat messages, not {shown}"):
        text_of(value, name="a.jsonl:7", column="x")
