"""Rows come once each and in order, whatever happens to the connection; what lasts is reported."""

import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub.utils
import pytest
from datasets import IterableDataset
from huggingface_hub.errors import HfHubHTTPError
from pyarrow import ArrowInvalid

from gpt2x.config import CorpusSection
from gpt2x.errors import UserError
from gpt2x.streams.ledger import Position
from gpt2x.streams.reading import Patience, StreamBrokenError, read_rows

CORPUS = CorpusSection(kind="dataset", dataset="json", data_files=["rows.jsonl"])
NUM_ROWS = 30


def status_error(status):
    response = huggingface_hub.utils.httpx.Response(status)
    response.request = huggingface_hub.utils.httpx.Request("GET", "http://localhost/rows.jsonl")
    return HfHubHTTPError(f"status {status}", response=response)


@pytest.fixture
def serve(monkeypatch):
    """Rows 0, 1, ... of a dataset whose reading meets, at some rows, errors or pauses, each once."""

    def start(accidents, *, on_opening=()):
        accidents, on_opening = dict(accidents), list(on_opening)

        def rows() -> Iterator[dict]:
            for number in range(NUM_ROWS):
                accident = accidents.pop(number, None)
                if isinstance(accident, BaseException):
                    raise accident
                if accident:
                    time.sleep(accident)
                yield {"text": str(number)}

        def open_rows(corpus):
            if on_opening:
                raise on_opening.pop(0)
            return IterableDataset.from_generator(rows)

        monkeypatch.setattr("gpt2x.streams.reading.open_rows", open_rows)

    return start


@pytest.fixture
def pauses(monkeypatch):
    """How long was waited before trying again, without waiting."""
    found = []
    clock = SimpleNamespace(sleep=found.append, monotonic=time.monotonic)
    monkeypatch.setattr("gpt2x.streams.reading.time", clock)
    return found


def values(*, corpus=CORPUS, retry_s=5.0, stall_s=5.0, was_open=False):
    patience = Patience(retry_s=retry_s, stall_s=stall_s)
    return [int(row.value) for row in read_rows(corpus, Position(), patience, was_open=was_open)]


def test_rows_can_be_read_on_from_the_place_of_any_of_them(tmp_path):
    for file in range(3):
        (tmp_path / f"{file}.jsonl").write_text("".join(f'{{"text": "{10 * file + row}"}}\n' for row in range(10)))
    files = [str(tmp_path / f"{file}.jsonl") for file in range(3)]
    corpus = CorpusSection(kind="dataset", dataset="json", data_files=files)
    patience = Patience(retry_s=1, stall_s=5)
    every = list(read_rows(corpus, Position(epoch=4), patience))
    assert [row.value for row in every] == [str(number) for number in range(30)]
    assert every[0].start == Position(epoch=4)
    for number in (0, 1, 9, 10, 11, 25, 29):
        rest = list(read_rows(corpus, every[number].start, patience))
        assert [row.value for row in rest] == [str(later) for later in range(number, 30)]


def test_broken_connections_lose_no_row_and_repeat_none(serve, pauses):
    serve({0: ConnectionResetError("reset"), 7: status_error(503), 8: status_error(429), 29: TimeoutError()})
    assert values() == list(range(NUM_ROWS))
    # The pauses begin anew after every row that came.
    assert pauses == [0.5, 0.5, 0.5, 0.5]


def test_the_pauses_double_up_to_half_a_minute_as_long_as_nothing_comes(serve, pauses):
    serve({}, on_opening=[ConnectionError("no route")] * 9)
    assert values(retry_s=1000) == list(range(NUM_ROWS))
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_connection_on_which_nothing_arrives_is_given_up(serve):
    serve({12: 1.5})
    started = time.monotonic()
    assert values(stall_s=0.3) == list(range(NUM_ROWS))
    assert time.monotonic() - started < 1.4


def test_what_breaks_for_longer_than_retry_s_is_broken_for_good(serve):
    serve({}, on_opening=[ConnectionError("no route")] * 99)
    with pytest.raises(StreamBrokenError, match="no route"):
        values(retry_s=0.2)


@pytest.mark.parametrize("error", [status_error(403), status_error(404), PermissionError("not yours")])
def test_what_trying_again_does_not_mend_is_not_tried_again(serve, pauses, error):
    serve({3: error})
    with pytest.raises(StreamBrokenError, match=r"status 40\d|not yours"):
        values(retry_s=1000)
    assert pauses == []


def test_what_cannot_be_opened_is_a_mistake_when_it_never_was_and_tried_again_when_it_was(serve, pauses):
    serve({}, on_opening=[UserError("no such file")])
    with pytest.raises(UserError, match="no such file"):
        values()
    serve({}, on_opening=[UserError("no such file")])
    assert values(was_open=True) == list(range(NUM_ROWS))


def test_a_server_is_asked_for_a_while_before_its_no_is_believed(serve, monkeypatch):
    monkeypatch.setattr("gpt2x.streams.reading.FIRST_DELAY_S", 0.01)
    remote = replace(CORPUS, data_files=["http://localhost/rows.jsonl"])
    serve({}, on_opening=[UserError("no such file")] * 3)
    assert values(corpus=remote) == list(range(NUM_ROWS))
    monkeypatch.setattr("gpt2x.streams.reading.NEVER_THERE_S", 0.1)
    serve({}, on_opening=[UserError("no such file")] * 99)
    with pytest.raises(UserError, match="no such file"):
        values(corpus=remote)


def test_the_cause_of_an_error_is_named_with_it(serve):
    error = ConnectionError("Server Disconnected")
    error.__cause__ = status_error(404)
    serve({3: error})
    with pytest.raises(StreamBrokenError, match="Server Disconnected: status 404"):
        values()


@pytest.mark.parametrize("error", [EOFError("Compressed file ended"), ArrowInvalid("JSON parse error in row 1")])
def test_rows_that_are_not_what_they_should_be_are_broken_for_good(serve, pauses, error):
    serve({4: error})
    with pytest.raises(StreamBrokenError, match=str(error)):
        values()
    assert pauses == []


def test_a_package_that_is_needed_for_the_files_is_named(serve):
    serve({}, on_opening=[ImportError('HTTPFileSystem requires "requests" and "aiohttp" to be installed')])
    with pytest.raises(UserError, match=r"HTTPFileSystem requires .*; http:// files need aiohttp and requests"):
        values()
