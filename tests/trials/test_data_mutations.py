"""Five hundred damages of every kind of file that data consist of: one line or a rebuild, no traceback, no hang."""

import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from huggingface_hub import constants

from gpt2x.config import CorpusSection, PreparationRecipe, TokenizerSection
from gpt2x.errors import UserError
from gpt2x.shards.index import load_index
from gpt2x.shards.preparation import prepare, prepare_task
from gpt2x.streams.ledger import Ledger, Position, StreamShard, ledger_file, read_ledger

pytestmark = pytest.mark.trial
NUM_MUTATIONS = 500
STRANGE = [None, True, -1, 0, 2**70, 1.5, "", "text", "\ud800", [], {}, [[]], {"a": {}}, "9" * 5000]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> PreparationRecipe:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    (tmp_path / "texts").mkdir()
    for number in range(6):
        rows = [json.dumps({"text": f"document {place} of file {number}"}) + "\n" for place in range(4)]
        (tmp_path / "texts" / f"{number}.jsonl").write_text("".join(rows))
    return PreparationRecipe(
        output_dir=tmp_path / "shards",
        corpus=CorpusSection(kind="files", paths=[f"{tmp_path}/texts"], validation_fraction=0.3),
        tokenizer=TokenizerSection(path=str(tmp_path / "tokenizer"), vocab_size=270),
        num_workers=1,
    )


def mutate(file: Path, generator: random.Random) -> None:
    """One damage of some kind."""
    content = bytearray(file.read_bytes())
    kinds = ["flip", "cut", "grow", "delete", "directory", "link", "device", "fifo", "deep", "digits", "type", "type"]
    kind = generator.choice(kinds)
    if kind == "flip":
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    elif kind == "cut":
        del content[generator.randrange(len(content)) :]
    elif kind == "grow":
        content += generator.randbytes(generator.randrange(1, 2000))
    elif kind == "deep":
        content = bytearray(b"[" * 100_000)
    elif kind == "digits":
        content = content.replace(b"1", b"1" * 5000, 1)
    elif kind == "type":
        content = retyped(content, generator)
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind in ("link", "device"):
        file.symlink_to({"link": file.name, "device": "/dev/zero"}[kind])
    elif kind != "delete":
        file.write_bytes(content)


def retyped(content: bytearray, generator: random.Random) -> bytearray:
    """A value somewhere in the JSON, or in a shard's header, is of another type; or a key is gone."""
    size = int.from_bytes(content[:8], "little")
    start = 8 if size < len(content) else 0
    text = content[start : start + size] if start else content
    value = json.loads(text)
    places = [(value, key) for key in value]
    for place, key in places:
        inner = place[key]
        places += (
            [(inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))]
            if isinstance(inner, dict | list)
            else []
        )
    place, key = generator.choice(places)
    if isinstance(place, dict) and generator.random() < 0.2:
        del place[key]
    else:
        place[key] = generator.choice(STRANGE)
    changed = bytearray(json.dumps(value).encode())
    if not start:
        return changed
    return bytearray(len(changed).to_bytes(8, "little")) + changed + content[8 + size :]


def restore(backup: Path, directory: Path) -> None:
    shutil.rmtree(directory)
    shutil.copytree(backup, directory)  # with the times of the files


def survives(run) -> str:
    """Why the run refuses, nothing where it does not; anything else than a UserError fails the test, and so do ten
    seconds."""
    signal.alarm(10)
    try:
        run()
    except UserError as error:
        return str(error)
    finally:
        signal.alarm(0)
    return ""


def read_all(directory: Path) -> None:
    index = load_index(directory)
    for split in index.splits:
        for shard in index.open_split(split):
            shard.tokens.sum()


@pytest.mark.parametrize("name", ["index.json", "train/tokens_part_00000.safetensors", "sources.json"])
def test_finished_data(recipe, tmp_path, name):
    prepare(recipe)
    backup = shutil.copytree(recipe.output_dir, tmp_path / "backup")
    generator, ends = random.Random(1), []
    for _ in range(NUM_MUTATIONS):
        mutate(recipe.output_dir / name, generator)
        ends += [survives(lambda: read_all(recipe.output_dir)), survives(lambda: prepare(recipe))]
        restore(backup, recipe.output_dir)
    read_all(recipe.output_dir)
    assert "\n" not in "".join(ends)
    assert any(ends)


def test_kept_answers(recipe, tmp_path):
    prepare(recipe)
    expected = load_index(recipe.output_dir)
    read_all(recipe.output_dir)
    home = tmp_path / "home" / "gpt2x"
    backup = shutil.copytree(home, tmp_path / "backup")
    generator = random.Random(2)
    for _ in range(NUM_MUTATIONS):
        mutate(generator.choice(sorted(home.glob("scan-*.json"))), generator)
        assert "\n" not in survives(lambda: read_all(recipe.output_dir))
        restore(backup, home)
    assert load_index(recipe.output_dir) == expected


@pytest.mark.parametrize("name", ["tasks/task_00000.json", "sources.json"])
def test_records_of_a_preparation_that_is_under_way(recipe, tmp_path, name):
    recipe = dataclasses.replace(recipe, num_tasks=2)
    expected = prepare(dataclasses.replace(recipe, output_dir=tmp_path / "expected"))
    prepare_task(recipe, 0)
    backup = shutil.copytree(recipe.output_dir, tmp_path / "backup")
    generator = random.Random(3)
    for _ in range(NUM_MUTATIONS // 4):
        mutate(recipe.output_dir / name, generator)
        if not survives(lambda: prepare(recipe)):
            assert load_index(recipe.output_dir).fingerprint == expected.fingerprint
            read_all(recipe.output_dir)
        restore(backup, recipe.output_dir)


def test_a_streams_ledger(tmp_path):
    entry = {"file": "a", "num_tokens": 1, "num_documents": 1, "num_bytes": 1, "sha256": "a"}
    shards = [
        StreamShard(
            **entry, number=n, era=n, ends_era=True, start=Position(state={"n": n}), end=Position(state={"n": n + 1})
        )
        for n in range(3)
    ]
    generator = random.Random(4)
    for _ in range(NUM_MUTATIONS):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        (tmp_path / "cache").mkdir()
        Ledger(definition={"a": 1}, shards={shard.number: shard for shard in shards}).write(tmp_path / "cache")
        mutate(ledger_file(tmp_path / "cache"), generator)
        assert not survives(lambda: read_ledger(tmp_path / "cache"))
