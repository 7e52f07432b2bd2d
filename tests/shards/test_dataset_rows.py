"""Of a dataset the columns that are read matter alone, and what is wrong with its files is said with file and row."""

import gzip
import http.server
import json
import threading
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gpt2x.config import CorpusSection
from gpt2x.corpus.documents import Share, open_corpus, read_pieces
from gpt2x.errors import UserError

both = pytest.mark.parametrize("streaming", [True, False])
# datasets logs what it raises.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def good(tmp_path) -> Path:
    return write(tmp_path / "good.jsonl", '{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n')


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def corpus(builder: str, *files: Path | str, **fields) -> CorpusSection:
    return CorpusSection(kind="dataset", dataset=builder, data_files=[str(file) for file in files], **fields)


def texts(section: CorpusSection, *, share: Share | None = None, dropped: Counter[str] | None = None) -> list[str]:
    reading = open_corpus(section, lambda _: None, share=share or Share())
    pieces = read_pieces(reading, dropped=Counter() if dropped is None else dropped, cuts=False)
    return [piece.text for piece in pieces]


# --- the columns that are read ---------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_a_json_column_that_is_not_read_may_hold_anything(tmp_path, good, streaming, num_tasks):
    rows = [{"n": {"z": 1}, "text": "c"}, {"text": "d", "n": "x"}, {"text": "e", "n": [[1], 2]}, {"text": "f"}]
    other = write(tmp_path / "other.jsonl", "\n".join(map(json.dumps, rows)))
    section = corpus("json", good, other, streaming=streaming)
    read = [texts(section, share=Share(task=task, num_tasks=num_tasks)) for task in range(num_tasks)]
    assert sorted(text for share in read for text in share) == ["a", "b", "c", "d", "e", "f"]
    assert num_tasks > 1 or read == [["a", "b", "c", "d", "e", "f"]]


@both
def test_a_parquet_column_that_is_not_read_may_be_missing_or_of_another_type(tmp_path, streaming):
    columns = [{"text": ["a"], "n": [1]}, {"text": ["b"], "n": ["x"]}, {"m": [1.5], "text": ["c"]}]
    for number, table in enumerate(columns):
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / f"{number}.parquet")
    assert texts(corpus("parquet", tmp_path / "*.parquet", streaming=streaming)) == ["a", "b", "c"]


@both
def test_a_conversation_is_read_beside_a_column_of_changing_type(tmp_path, streaming):
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": turns, "n": 1}, {"messages": turns, "n": "x"}]
    section = corpus("json", write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), streaming=streaming)
    reading = open_corpus(section, lambda _: None, as_chat=True)
    assert [chat.messages for chat in read_pieces(reading, dropped=Counter(), cuts=False)] == [turns, turns]


def test_a_text_that_looks_like_a_date_is_text_and_blank_lines_are_no_rows(tmp_path):
    lines = '{"text": "2020-01-01T00:00:00Z"}\n\n  \n{"text": "1e5"}\n{"n": 1}\n{"text": null}\n'
    dropped: Counter[str] = Counter()
    section = corpus("json", write(tmp_path / "a.jsonl", "\ufeff" + lines))
    assert texts(section, dropped=dropped) == ["2020-01-01T00:00:00Z", "1e5"]
    assert dropped == {"empty": 2}


@both
def test_a_missing_column_of_json_lines_is_refused_with_those_found(good, streaming):
    with pytest.raises(
        UserError, match=r"\(json\) has no column 'body', only: text, n; set corpus.text_column to one"
    ):
        texts(corpus("json", good, streaming=streaming, text_column="body"))


# --- what is wrong with the files ------------------------------------------------------------------------------------

GZ = gzip.compress("".join(json.dumps({"text": str(number)}) + "\n" for number in range(999)).encode())
FAULTS = {
    "a broken line": ("x.jsonl", b'{"text": "c"}\n{"text":\n', r"/x.jsonl:2 is not JSON \(Expecting value\); a .json"),
    "no object": ("x.jsonl", b'{"text": "c"}\n[1]\n', r"/x.jsonl:2 is no JSON object but a list; a .jsonl file holds"),
    "latin-1": ("x.jsonl", b'{"text": "c"}\n{"text": "caf\xe9"}\n', r"/x.jsonl:2 is not UTF-8; repair it or leave"),
    "a cut archive": ("x.jsonl.gz", GZ[:-90], r"/x.jsonl.gz' cannot be read \(Compressed file ended before .*\); re"),
}  # fmt: skip


@both
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_fault_of_a_json_file_is_told_with_file_and_line(tmp_path, good, streaming, fault, is_first):
    name, content, complaint = FAULTS[fault]
    files = [write(tmp_path / name, content)] if is_first else [good, write(tmp_path / name, content)]
    with pytest.raises(UserError, match=complaint):
        texts(corpus("json", *files, streaming=streaming))


@both
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_parquet_file_is_told_by_its_name(tmp_path, streaming, damage):
    for name in ("a", "b"):
        table = pyarrow.table({"text": [f"{name} {number}" for number in range(20_000)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[500:600] = b"\xff" * 100
    write(tmp_path / "b.parquet", bytes(content[:-90] if damage == "cut" else content))
    with pytest.raises(UserError, match=r"/b.parquet' cannot be read \(.+\); repair it or leave it out\.$"):
        texts(corpus("parquet", tmp_path / "a.parquet", tmp_path / "b.parquet", streaming=streaming))


def test_a_fault_of_a_text_or_csv_file_is_told_by_its_name(tmp_path):
    with pytest.raises(UserError, match=r"/a.txt is not UTF-8; repair it or leave the file out of corpus.data_files"):
        texts(corpus("text", write(tmp_path / "a.txt", b"caf\xe9\n")))
    with pytest.raises(UserError, match=r"/a.csv:3 has 4 cells, and there are 2 columns; correct the row, or quote"):
        texts(corpus("csv", write(tmp_path / "a.csv", "text,n\na,1\nb,2,3,4\n")))


def test_a_dataset_without_a_row_has_no_document(tmp_path, good):
    assert texts(corpus("json", write(tmp_path / "empty.jsonl", ""))) == []
    assert texts(corpus("json", write(tmp_path / "empty.jsonl", "\n"), good)) == ["a", "b"]
    with pytest.raises(UserError, match=r"corpus.dataset \(json\) holds no row; correct corpus.data_files or data"):
        texts(corpus("json", write(tmp_path / "empty.json", "")))


@both
def test_a_name_with_brackets_is_that_name(tmp_path, streaming):
    file = write(tmp_path / "[set] a" / "x [1].jsonl", '{"text": "a"}\n')
    assert texts(corpus("json", file, streaming=streaming)) == ["a"]


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = 404 if "missing" in self.path else 200
        body = b'{"text": "a", "n": 1}\n{"text": "b"\n' if "broken" in self.path else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("missing.jsonl", "cannot be read: Unable to find '.*/missing.jsonl'; correct corpus.dataset, dataset_config"),
        ("broken.jsonl", "cannot be read: a row is no JSON, or of another type than those before; correct"),
        ("empty.jsonl", "holds no row; correct corpus.data_files or dataset_split"),
    ],
)
def test_a_stream_that_is_missing_broken_or_empty_is_told_in_one_line(server, monkeypatch, path, complaint):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=rf"^corpus.dataset \(json\) {complaint}"):
        texts(corpus("json", f"{server}/{path}"))
