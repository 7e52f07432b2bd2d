"""What a filler says and writes of a stream whose address has a password and a signature."""

import json
import subprocess
import sys
from types import SimpleNamespace

from gpt2x.config import CorpusSection
from gpt2x.streams.filler import fill
from gpt2x.streams.ledger import failure_file
from gpt2x.streams.reading import Patience, StreamBrokenError

ADDRESS = "http://reader:PASS@localhost/rows.jsonl?part=1&X-Amz-Signature=PASS"
PUBLIC = "http://localhost/rows.jsonl?part=1"


def test_the_failure_of_a_broken_stream_names_its_address_without_secrets(tmp_path):
    def run():
        raise StreamBrokenError(f"403, message='Forbidden', url='{ADDRESS}'")

    corpus = CorpusSection(kind="dataset", dataset="json", data_files=[ADDRESS])
    patience, recipe = Patience(retry_s=1, stall_s=1), SimpleNamespace(name="web")
    fill(SimpleNamespace(run=run, corpus=corpus, patience=patience, recipe=recipe, cache_dir=tmp_path))
    message = json.loads(failure_file(tmp_path).read_bytes())["message"]
    assert message.startswith(f"stream 'web' ({PUBLIC}) is broken: 403, message='Forbidden', url='{PUBLIC}'; see to")


def test_what_a_filler_prints_is_without_secrets():
    """Its standard error is a file beside the shards."""
    code = (
        "import runpy, sys, gpt2x.streams.filler as filler\n"
        "def fails(): raise ValueError(sys.argv[1])\n"
        "filler.main = fails\n"
        "runpy.run_module('gpt2x.streams', run_name='__main__')"
    )
    printed = subprocess.run([sys.executable, "-c", code, ADDRESS], capture_output=True, text=True).stderr
    assert printed.endswith(f"ValueError: {PUBLIC}\n")
    assert "PASS" not in printed
