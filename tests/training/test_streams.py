"""A run that trains on a stream: the same samples however often it is stopped, and an end when the stream has one."""

import base64
import json
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from gpt2x.batches.read_ahead import ReadAhead
from gpt2x.checkpoints.format import newest_checkpoint
from gpt2x.config import CorpusSection, SourceSection, StreamSection
from gpt2x.errors import UserError
from gpt2x.training.signals import StopRequest

WORDS = ["def", "return", "(", ")", ":", "\n", "self", "value", "=", "1", "été", "if"]


@pytest.fixture
def stream(shards_dir, tmp_path):
    """Rows of random words, tokenized by the tokenizer of the shards, four small shards in the cache."""
    generator, file = random.Random(0), tmp_path / "rows.jsonl"
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(20, 120))) for _ in range(120)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = CorpusSection(kind="dataset", dataset="json", data_files=[str(file)], validation_fraction=0.2)
    return StreamSection(
        corpus=corpus,
        tokenizer=str(shards_dir / "tokenizer"),
        cache_dir=tmp_path / "cache",
        max_cached_shards=4,
        shards_per_era=2,
        tokens_per_shard=800,
        retry_s=1,
        stall_s=10,
    )


@pytest.fixture
def streaming(recipe, changed, stream):
    """The recipe on the stream alone."""
    return changed(recipe, data={"path": None, "stream": stream})


def checksums(run):
    return [record["data/checksum"] for record in run.records() if "train/loss" in record]


@pytest.mark.trial
def test_a_run_on_a_stream_that_is_stopped_twice_equals_one_that_is_not(
    streaming, changed, pretrain, assert_equal_tensors, stream
):
    straight = pretrain(changed(streaming, run={"name": "straight"}))
    assert len(set(checksums(straight))) == 20
    pretrain(streaming, stop_after=6)
    shutil.rmtree(stream.cache_dir)
    pretrain(streaming, stop_after=13)
    resumed = pretrain(streaming)
    assert checksums(resumed) == checksums(straight)
    assert_equal_tensors(resumed.saved(), straight.saved())
    assert resumed.validation == straight.validation


def test_a_stream_is_one_source_of_a_mixture(recipe, changed, pretrain, stream, shards_dir):
    sources = [
        SourceSection(name="files", path=shards_dir, weight=3.0),
        SourceSection(name="web", stream=stream, weight=1.0),
    ]
    run = pretrain(changed(recipe, data={"path": None, "sources": sources, "block_size": 8}))
    assert {record["data/web/share"] for record in run.records() if "train/loss" in record} == {0.25}
    assert run.validation.num_tokens > 0


def test_a_run_whose_stream_breaks_is_saved_first_and_goes_on_when_it_is_mended(
    streaming, changed, pretrain, stream, tmp_path
):
    straight = pretrain(changed(streaming, run={"name": "straight"}))
    shutil.rmtree(stream.cache_dir)
    pretrain(streaming, stop_after=2)
    (tmp_path / "rows.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (tmp_path / "rows.jsonl").write_text("no row\n")
    shutil.rmtree(stream.cache_dir / "train")
    with pytest.raises(UserError, match=r"stream 'train' .*rows.jsonl"):
        pretrain(streaming)
    (tmp_path / "elsewhere.jsonl").replace(tmp_path / "rows.jsonl")
    assert checksums(pretrain(streaming)) == checksums(straight)


def test_who_waits_for_a_stream_hears_a_signal_and_saves_what_was_trained(recipe, pretrain, monkeypatch):
    """The sixth step's rows do not come."""
    asked, original = [], ReadAhead.step

    def read(self, step, **options):
        asked.append(step)
        return None if step == 5 else original(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ReadAhead, "can_fail", True)
        patch.setattr(ReadAhead, "step", read)
        patch.setattr(StopRequest, "is_asked", lambda self: asked.count(5) == 3)
        run = pretrain(recipe)
    assert (run.validation, run.progress.step, asked.count(5)) == (None, 5, 3)
    assert newest_checkpoint(run.path)[0].name == "step-000005"
    assert pretrain(recipe).progress.step == 20


def test_a_stream_without_a_weight_is_refused_beside_another_source(recipe, changed, pretrain, stream, shards_dir):
    sources = [SourceSection(name="files", path=shards_dir), SourceSection(name="web", stream=stream)]
    with pytest.raises(UserError, match=r"source 'web' needs a weight: .* a stream's size is not known; set its"):
        pretrain(changed(recipe, data={"path": None, "sources": sources}))


def test_aligned_documents_are_refused_for_a_stream(streaming, changed, pretrain):
    with pytest.raises(UserError, match=r"data.align_documents is not made for streams; set it to false"):
        pretrain(changed(streaming, data={"align_documents": True}))


class Guarded(BaseHTTPRequestHandler):
    """Gives a file to whoever has the password and a signature that is valid now."""

    protocol_version = "HTTP/1.1"
    server: "GuardedServer"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        password = base64.b64encode(b"reader:PASS-WORD").decode()
        given = parse_qs(urlsplit(self.path).query)
        is_open = self.headers.get("Authorization") == f"Basic {password}"
        is_open = is_open and given.get("X-Amz-Signature") == [self.server.signature] and given.get("part") == ["1"]
        first, last = 0, len(self.server.content) - 1
        if requested := self.headers.get("Range"):
            first, last = (int(bound or last) for bound in requested.partition("=")[2].split("-"))
        body = self.server.content[first : last + 1] if is_open else b""
        self.send_response((206 if requested else 200) if is_open else 403)
        self.send_header("Content-Length", str(len(body)))
        if is_open:
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.server.content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815


class GuardedServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Guarded)
        self.content, self.signature = content, ""

    def signed(self, signature: str) -> str:
        """The address under a new signature, after which the one before is worth nothing."""
        self.signature = signature
        place = f"reader:PASS-WORD@127.0.0.1:{self.server_address[1]}/rows.jsonl?part=1"
        return f"http://{place}&X-Amz-Signature={signature}&X-Amz-Date=20260101&token=TOK-EN"


@contextmanager
def guarded(content: bytes) -> Iterator[GuardedServer]:
    with GuardedServer(content) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_secrets_of_an_address_are_written_nowhere_and_a_renewed_one_goes_on(
    streaming, changed, pretrain, stream, tmp_path
):
    from gpt2x.publishing.model_card import model_card

    with guarded((tmp_path / "rows.jsonl").read_bytes()) as server:

        def under(signature, max_steps=6):
            corpus = replace(stream.corpus, data_files=[server.signed(signature)])
            data = {"path": None, "stream": replace(stream, corpus=corpus)}
            return changed(streaming, data=data, train={"max_steps": max_steps})

        pretrain(under("SIGN-ONE"), stop_after=2)
        shutil.rmtree(stream.cache_dir / "train")
        run = pretrain(under("SIGN-TWO"))
        assert len(set(checksums(run))) == 6
        address = f"http://127.0.0.1:{server.server_address[1]}/rows.jsonl?part=1"
    recorded = yaml.safe_load((run.path / "config.yaml").read_text())
    assert recorded["data"]["stream"]["corpus"]["data_files"] == [address]
    card = model_card(run.path, repo_id="user/tiny", license="mit")
    assert address in card
    files = [file for place in (run.path, stream.cache_dir) for file in place.rglob("*") if file.is_file()]
    assert {file.name for file in files if address.encode() in file.read_bytes()} >= {"trainer.json", "ledger.json"}
    for secret in ("PASS-WORD", "SIGN-", "TOK-EN", base64.b64encode(b"reader:PASS-WORD").decode()):
        assert secret not in card
        assert [file for file in files if secret.encode() in file.read_bytes()] == []
