"""What a stream must give, worked out in plain Python; how a training loop reads; a filler without a process."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from gpt2x.batches.order import permute, round_keys
from gpt2x.batches.stream import StreamSource
from gpt2x.config import StreamSection
from gpt2x.corpus.documents import is_validation
from gpt2x.streams.filler import Filler, fill
from gpt2x.tokenizers.bpe import load_tokenizer, text_encoder

LENGTH, SEED = 16, 5


class Stopped(Exception):  # noqa: N818
    """The test is over."""


class FillerThread:
    """A filler in a thread of the test instead of a process of its own, which takes two seconds to start."""

    pid = None

    def __init__(self, name: str, cache_dir: Path) -> None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        self.stopped, self.thread = threading.Event(), threading.Thread(target=self._run, daemon=True)

    def start(self, recipe) -> None:
        stopped = self.stopped

        class StoppableFiller(Filler):
            def _missing(self):
                if stopped.is_set():
                    raise Stopped
                return super()._missing()

        self.filler = StoppableFiller(recipe)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(Stopped):
            fill(self.filler)

    def keep_alive(self, recipe) -> None:
        pass

    def forget_before(self, beginning) -> None:
        self.filler.forget_before(beginning)

    def close(self) -> None:
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join(10)
        assert not self.thread.is_alive()


def read(source: StreamSource, start: int, stop: int, *, step: int = 8, watch: Callable[[], None] = lambda: None):
    """Draws as a training loop asks for them, (stop - start, T)."""
    parts = []
    for draw in range(start, stop, step):
        source.release(draw)
        source.require(min(draw + step, stop))
        watch()
        parts.append(source.sequences(np.arange(draw, min(draw + step, stop))).ids)
    return np.concatenate(parts)


class NaiveStream:
    """What the stream must give: everything in lists, nothing recorded, nothing deleted."""

    def __init__(self, texts, section: StreamSection, *, num_epochs: int = 2) -> None:
        encoder = text_encoder(load_tokenizer(section.tokenizer))
        eos = load_tokenizer(section.tokenizer).eos_token_id
        every = [text for file in texts for text in file if text]
        self.training = [text for text in every if not is_validation(text, section.corpus)]
        self.held_out = [text for text in every if is_validation(text, section.corpus)]
        encoded = [[*encoder.encode(text, add_special_tokens=False).ids, eos] for text in self.training]
        self.epoch_shards = _shards(encoded, section.tokens_per_shard)
        self.eras, self.first_draws = [], [0]
        for epoch in range(num_epochs):
            rest = list(self.epoch_shards)
            while rest:
                size = 1 if not self.eras else section.shards_per_era
                self.eras.append(SimpleNamespace(epoch=epoch, shards=rest[:size], windows=_windows(rest[:size])))
                self.first_draws.append(self.first_draws[-1] + len(self.eras[-1].windows))
                rest = rest[size:]

    @property
    def num_draws(self) -> int:
        return self.first_draws[-1]

    def sequences(self, start: int, stop: int) -> np.ndarray:
        return np.array([self._sequence(draw) for draw in range(start, stop)])

    def _sequence(self, draw: int) -> list[int]:
        number = max(number for number, first in enumerate(self.first_draws) if first <= draw)
        windows = self.eras[number].windows
        keys = round_keys(SEED, "era", "web", number)
        (place,) = permute(np.array([draw - self.first_draws[number]]), len(windows), keys)
        return windows[place]


def _shards(encoded: list[list[int]], tokens_per_shard: int) -> list[list[int]]:
    shards: list[list[int]] = [[]]
    for ids in encoded:
        if shards[-1] and len(shards[-1]) + len(ids) > tokens_per_shard:
            shards.append([])
        shards[-1] = shards[-1] + ids
    return shards


def _windows(shards: list[list[int]]) -> list[list[int]]:
    return [shard[start : start + LENGTH] for shard in shards for start in range(0, len(shard) - LENGTH + 1, LENGTH)]
