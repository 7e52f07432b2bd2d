"""Three .jsonl files of short documents and a stream of them."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from naive_stream import LENGTH, SEED, FillerThread, NaiveStream

from gpt2x.batches.stream import StreamSource
from gpt2x.config import CorpusSection, StreamSection, TokenizerSection
from gpt2x.tokenizers.bpe import save_tokenizer, train_tokenizer

NUM_FILES, DOCUMENTS_PER_FILE = 3, 25


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def texts() -> list[list[str]]:
    """The documents of each file."""
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdef", k=5)) for _ in range(80)]
    return [
        [
            f"{file}-{row} " + " ".join(generator.choices(words, k=generator.randint(3, 30)))
            for row in range(DOCUMENTS_PER_FILE)
        ]
        for file in range(NUM_FILES)
    ]


@pytest.fixture(scope="session")
def tokenizer_dir(texts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "tokenizer"
    every = [text for file in texts for text in file]
    save_tokenizer(train_tokenizer(every, TokenizerSection(path=str(path), vocab_size=300)), path)
    return path


@pytest.fixture
def section(texts, tokenizer_dir, tmp_path) -> StreamSection:
    """Shards of 300 tokens, two per era, four in the cache."""
    files = []
    for number, file_texts in enumerate(texts):
        files.append(tmp_path / f"part-{number}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in file_texts))
    corpus = CorpusSection(
        kind="dataset", dataset="json", data_files=[str(file) for file in files], validation_fraction=0.15
    )
    return StreamSection(
        corpus=corpus,
        tokenizer=str(tokenizer_dir),
        cache_dir=tmp_path / "cache",
        max_cached_shards=4,
        shards_per_era=2,
        tokens_per_shard=300,
        retry_s=1,
        stall_s=10,
    )


@pytest.fixture
def in_thread(monkeypatch) -> None:
    """Fillers run in threads."""
    monkeypatch.setattr("gpt2x.streams.cache.FillerProcess", FillerThread)


@pytest.fixture
def open_source(section) -> Iterator[Callable[..., StreamSource]]:
    """Opens sources of the stream and closes them at the end, however the test ends."""
    sources: list[StreamSource] = []

    def open_one(*, state=None, fills=True, length=LENGTH, **changes) -> StreamSource:
        changed = replace(section, **changes)
        sources.append(StreamSource(changed, length, seed=SEED, name="web", fills=fills, state=state))
        return sources[-1]

    yield open_one
    for source in sources:
        source.close()


@pytest.fixture
def naive(texts, section) -> NaiveStream:
    return NaiveStream(texts, section)


@pytest.fixture
def delete_cache(section) -> Callable[[], None]:
    return lambda: shutil.rmtree(section.cache_dir)
