"""A corpus of conversations is known by the names of its columns, and a row that is otherwise is named."""

import dataclasses
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from gpt2x.config import CorpusSection
from gpt2x.corpus.documents import Share, open_corpus, read_pieces
from gpt2x.errors import UserError

ASKED, ANSWERED = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4 – vier."}
CHAT = [ASKED, ANSWERED]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "{}"}
SHAREGPT = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4 – vier."}]

LAYOUTS = {
    "messages": ({"messages": [SYSTEM, *CHAT, TOOL], "source": "x"}, [SYSTEM, *CHAT, TOOL]),
    "ShareGPT": ({"id": "7", "conversations": SHAREGPT}, CHAT),
    "conversations with roles": ({"conversations": CHAT}, CHAT),
    "prompt and completion": ({"prompt": "2+2?", "completion": "4 – vier."}, CHAT),
    "lists of prompt and completion": ({"completion": [ANSWERED], "prompt": [SYSTEM, ASKED]}, [SYSTEM, *CHAT]),
    "Alpaca": ({"instruction": "2+2?", "input": "", "output": "4 – vier.", "text": "### all of it"}, CHAT),
    "Alpaca with an input": (
        {"instruction": "Add.", "input": "2+2", "output": "4"},
        [{"role": "user", "content": "Add.\n\n2+2"}, {"role": "assistant", "content": "4"}],
    ),
    "Alpaca without inputs": ({"instruction": "2+2?", "output": "4 – vier."}, CHAT),
    "question and answer": ({"question": "2+2?", "answer": "4 – vier."}, CHAT),
    "UltraChat": ({"prompt": "2+2?", "prompt_id": "1", "messages": CHAT}, CHAT),
    "a system column": ({"system": "Be brief.", "conversations": SHAREGPT}, [SYSTEM, *CHAT]),
    "a system column of Alpaca": (
        {"system": "Be brief.", "instruction": "2+2?", "output": "4 – vier."},
        [SYSTEM, *CHAT],
    ),
    "a system column of a pair": (
        {"system": "Be brief.", "prompt": "2+2?", "completion": "4 – vier."},
        [SYSTEM, *CHAT],
    ),
    "a system column that is empty": ({"system": "", "messages": CHAT}, CHAT),
    "a system column beside a system turn": ({"system": "Be long.", "messages": [SYSTEM, *CHAT]}, [SYSTEM, *CHAT]),
    "text": ({"text": "Just a text.\n", "id": 1}, None),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(file: Path, rows: list) -> Path:
    """Rows as what the file's name says."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(file, table.schema) as opened:
            opened.write_table(table)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines))
    elif file.suffix == ".zst":
        file.write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    else:
        file.write_bytes(lines)
    return file


def files(*paths: Path) -> CorpusSection:
    return CorpusSection(kind="files", paths=[str(path) for path in paths])


def read(corpus: CorpusSection, *, dropped: Counter[str] | None = None, share: Share | None = None) -> list:
    reading = open_corpus(corpus, lambda _: None, share=share or Share(), as_chat=True)
    return list(read_pieces(reading, dropped=Counter() if dropped is None else dropped, cuts=False))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_known_by_the_names_of_its_columns(tmp_path, layout, name):
    row, messages = LAYOUTS[layout]
    (chat,) = read(files(write(tmp_path / name, [row])))
    assert chat.messages == messages
    if messages is None:
        assert chat.text == row["text"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.arrow"])
def test_every_kind_of_file_with_columns_holds_conversations(tmp_path, name):
    assert [chat.messages for chat in read(files(write(tmp_path / name, [{"messages": CHAT}] * 2)))] == [CHAT, CHAT]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("builder", "name"), [("json", "a.jsonl"), ("parquet", "a.parquet")])
@pytest.mark.parametrize("layout", ["messages", "ShareGPT", "Alpaca with an input"])
def test_the_rows_of_a_dataset_are_conversations_too(tmp_path, streaming, builder, name, layout):
    row, messages = LAYOUTS[layout]
    file = write(tmp_path / name, [row] * 3)
    corpus = CorpusSection(kind="dataset", dataset=builder, data_files=[str(file)], streaming=streaming)
    chats = [read(corpus, share=Share(task=task, num_tasks=2)) for task in range(2)]
    assert [chat.messages for share in chats for chat in share] == [messages] * 3
    if not streaming:
        assert [chat.name for share in chats for chat in share] == [f"{builder} row {number}" for number in range(3)]


@pytest.mark.parametrize(
    ("name", "role"),
    [("observation", "tool"), ("function_response", "tool"), ("chatgpt", "assistant"), ("model", "assistant")],
)
def test_other_names_of_the_roles_are_known(tmp_path, name, role):
    (chat,) = read(files(write(tmp_path / "a.jsonl", [{"conversations": [{"from": name, "value": "x"}]}])))
    assert chat.messages == [{"role": role, "content": "x"}]


def test_messages_of_both_kinds_in_one_table_are_read_though_each_has_the_others_keys(tmp_path):
    rows = [{"conversations": SHAREGPT}, {"conversations": CHAT}]
    assert [chat.messages for chat in read(files(write(tmp_path / "a.parquet", rows)))] == [CHAT, CHAT]


def test_a_column_that_may_be_there_is_read_where_the_first_row_lacks_it(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "input": "of this"}]
    read_rows = read(files(write(tmp_path / "a.jsonl", rows)))
    assert [chat.messages[0]["content"] for chat in read_rows] == ["a", "a\n\nof this"]


def test_the_same_conversation_falls_on_the_same_side_whatever_its_layout(tmp_path):
    rows = [LAYOUTS[layout][0] for layout, (_, messages) in LAYOUTS.items() if messages == CHAT]
    corpora = [files(write(tmp_path / f"{number}.jsonl", [row])) for number, row in enumerate(rows)]
    for seed in range(9):
        halves = [dataclasses.replace(corpus, split_seed=seed, validation_fraction=0.5) for corpus in corpora]
        assert len({chat.is_validation for corpus in halves for chat in read(corpus)}) == 1
    assert len(rows) == 8


def test_what_is_no_unicode_is_left_out_and_counted(tmp_path):
    half = [{"role": "user", "content": "\ud800"}, ANSWERED]
    file = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": half}])
    file.write_bytes(file.read_bytes() + b'{"messages": "\xff"}\n')
    dropped: Counter[str] = Counter()
    assert len(read(files(file), dropped=dropped)) == 1
    assert dropped == {"not UTF-8": 2}


def test_texts_that_are_empty_are_left_out_and_counted(tmp_path):
    dropped: Counter[str] = Counter()
    rows = [{"text": text} for text in ("a", None, " \n", "")]
    assert [chat.text for chat in read(files(write(tmp_path / "a.jsonl", rows)), dropped=dropped)] == ["a"]
    assert dropped == {"empty": 3}


def test_columns_of_no_layout_are_refused_with_those_of_every_layout(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"dialog": CHAT, "prompt": "x"}])
    expected = (
        r"a.jsonl has the columns dialog, prompt, which make no conversation; rename them to those of one layout "
        r"\(messages; conversations; prompt \+ completion; instruction \+ output; question \+ answer; text\), or leave"
    )
    with pytest.raises(UserError, match=expected):
        read(files(file))
    with pytest.raises(UserError, match=r"corpus.dataset \(json\) has the columns dialog, prompt, which make no conv"):
        read(CorpusSection(kind="dataset", dataset="json", data_files=[str(file)]))


MISTAKES = {
    "a.jsonl:2 has no column 'messages', only: text; the corpus begins with the columns messages: give every": {
        "text": "x"
    },
    "a.jsonl:2: column 'messages' must hold a list of messages, not null; correct the row or leave": {
        "messages": None
    },
    "a.jsonl:2: column 'messages' must hold a list of messages, not 'Hi.'; correct": {"messages": "Hi."},
    "a.jsonl:2: message 1 of 'messages' must have a role and a content, not be 'Hi.'; correct": {"messages": ["Hi."]},
    "a.jsonl:2: message 2 of 'messages' is said by 'narrator', who is none of system, user, human, assistant": {
        "messages": [ASKED, {"role": "narrator", "content": "x"}]
    },
    "a.jsonl:2: message 1 of 'messages' is said by null, who is none of": {"messages": [{"content": "x"}]},
    "a.jsonl:2: message 1 of 'messages' is said by ['user'], who is none of": {
        "messages": [{"role": ["user"], "content": "x"}]
    },
    "a.jsonl:2: message 2 of 'messages' must have text as its content, not null; correct the row": {
        "messages": [ASKED, {"role": "assistant", "content": None}]
    },
    "a.jsonl:2: message 1 of 'messages' must have text as its value, not 4; correct": {
        "messages": [{"from": "gpt", "value": 4}]
    },
    "a.jsonl:2: message 1 of 'messages' has tool_calls, which no chat template of text writes out; put them into": {
        "messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    },
    "a.jsonl:2: message 2 of 'messages' has weight 0.5, and a turn is learned or not; give it 1 (true) or 0 (fal": {
        "messages": [ASKED, {"role": "assistant", "content": "x", "weight": 0.5}]
    },
}


@pytest.mark.parametrize("complaint", MISTAKES)
def test_a_row_that_does_not_hold_messages_is_named_with_the_column(tmp_path, complaint):
    file = write(tmp_path / "a.jsonl", [{"messages": CHAT}, MISTAKES[complaint]])
    with pytest.raises(UserError, match=re.escape(complaint)):
        read(files(file))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": None, "completion": "b"}, "column 'prompt' must hold text, not null; correct the row or leave it"),
        ({"prompt": "a", "completion": 4}, "column 'completion' must hold text, not 4; correct the row or leave it"),
        ({"prompt": ["a"], "completion": "b"}, "message 1 of 'prompt' must have a role and a content, not be 'a'"),
        ({"instruction": "a", "input": 4, "output": "b"}, "column 'input' must hold text, not 4"),
        ({"instruction": "a", "output": [ANSWERED]}, "column 'output' must hold text, not [{'role'"),
        ({"question": "a", "answer": {"text": "b"}}, "column 'answer' must hold text, not {'text': 'b'}"),
        ({"text": CHAT}, "column 'text' holds a list; name a column of messages messages, or give text"),
    ],
)
def test_a_column_that_holds_no_text_is_named_with_its_row(tmp_path, row, complaint):
    with pytest.raises(UserError, match=rf"a.jsonl:1: {re.escape(complaint)}"):
        read(files(write(tmp_path / "a.jsonl", [row])))


def test_a_table_without_a_column_of_the_first_files_layout_is_refused(tmp_path):
    first = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    second = write(tmp_path / "b.parquet", [{"prompt": "a", "response": "b"}])
    with pytest.raises(
        UserError,
        match=r"b.parquet has no column 'completion', only: prompt, response; the corpus begins with the columns "
        r"prompt \+ completion: give every row those, or prepare the others by themselves",
    ):
        read(files(first, second))


@pytest.mark.parametrize("task", [0, 1])
def test_every_task_takes_the_layout_of_the_first_row_of_the_whole_corpus(tmp_path, task):
    first = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    second = write(tmp_path / "b.jsonl", [{"text": "x"}])
    share = Share(task=task, num_tasks=2)
    if task == 0:
        assert len(read(files(first, second), share=share)) == 1
    else:
        with pytest.raises(UserError, match=r"b.jsonl:1 has no column 'messages', only: text"):
            read(files(first, second), share=share)


def test_text_files_that_a_pattern_finds_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    (tmp_path / "b.txt").write_text("no columns")
    with pytest.raises(UserError, match=r"b.txt' has no columns, and chat reads conversations from columns; give .js"):
        read(files(tmp_path))


def test_a_row_of_a_stream_is_named_by_its_part_and_its_number_there(tmp_path):
    paths = [str(write(tmp_path / f"{n}.jsonl", [{"messages": CHAT}, {"messages": [ASKED] * n}])) for n in range(4)]
    corpus = CorpusSection(kind="dataset", dataset="json", data_files=paths)
    names = [chat.name for chat in read(corpus, share=Share(task=1, num_tasks=2))]
    assert names == [f"json part 1 of 2 row {number}" for number in range(4)]
    assert [chat.name for chat in read(corpus)][-1] == "json row 7"


def test_a_line_that_is_no_object_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a.jsonl:1 is no JSON object but a list; a .jsonl file holds one per line"):
        read(files(write(tmp_path / "a.jsonl", [["Hi."]])))


def test_a_corpus_without_a_row_has_no_conversation(tmp_path):
    assert read(files(write(tmp_path / "a.jsonl", []))) == []


def test_a_conversation_among_texts_is_refused_and_not_left_out(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "x"}, {"messages": CHAT}])
    with pytest.raises(UserError, match=r"a.jsonl:2 has no column 'text', only: messages; the corpus begins with"):
        read(files(file))


@pytest.mark.parametrize(
    ("line", "reason"), [("9" * 5000, "Exceeds the limit"), ("[" * 100_000, "maximum recursion"), ("{", "Expecting")]
)
def test_a_line_that_python_cannot_parse_is_refused(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(UserError, match=rf"a.jsonl:1 is not JSON \({reason}.*\); a .jsonl file holds one object per"):
        read(files(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("as_chat", [True, False])
def test_columns_of_the_same_name_are_refused(tmp_path, as_chat):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    corpus = files(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has 2 columns 'text'; rename all but one\.$"):
        list(open_corpus(corpus, lambda _: None, as_chat=as_chat).rows)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "function_call"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_what_is_said_besides_the_content_is_refused_by_name(tmp_path, key, name):
    rows = [{"messages": [ASKED, ANSWERED | {key: ""}]}, {"messages": [ASKED, ANSWERED | {key: "Two and two."}]}]
    complaint = rf"{name}:2: message 2 of 'messages' has {key}, which no chat template of text writes out; put them"
    with pytest.raises(UserError, match=complaint):
        read(files(write(tmp_path / name, rows)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_column_of_tools_is_refused_where_it_holds_some(tmp_path, name):
    without = [{"messages": CHAT, "tools": tools} for tools in (None, "", "[]")]
    assert len(read(files(write(tmp_path / name, without)))) == 3
    with pytest.raises(UserError, match=rf"{name}:4: column 'tools' holds tools, which no chat template of text writ"):
        read(files(write(tmp_path / name, [*without, {"messages": CHAT, "tools": '[{"name": "f"}]'}])))


FLAGS = [("train", False, True), ("loss", False, True), ("weight", 0, 1), ("weight", 0.0, 1.0)]


@pytest.mark.parametrize(("flag", "off", "on"), FLAGS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_an_unlearned_turn_is_marked_and_its_conversation_falls_on_the_same_side(tmp_path, flag, off, on, name):
    plain = [ASKED, ANSWERED, ASKED, ANSWERED]
    flagged = [ASKED | {flag: off}, ANSWERED | {flag: off}, ASKED | {flag: on}, ANSWERED | {flag: on}]
    (chat,) = read(files(write(tmp_path / name, [{"messages": flagged}])))
    assert [message.get("learned", True) for message in chat.messages] == [False, False, True, True]
    (expected,) = read(files(write(tmp_path / f"plain-{name}", [{"messages": plain}])))
    assert (chat.text, chat.is_validation) == (expected.text, expected.is_validation)


def test_a_flag_on_what_is_never_learned_may_say_anything(tmp_path):
    (chat,) = read(files(write(tmp_path / "a.jsonl", [{"messages": [ASKED | {"weight": 0.5}, ANSWERED]}])))
    assert chat.messages == CHAT
