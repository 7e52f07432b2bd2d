"""A stream as a source of sequences: eras of token shards, each shuffled by itself, one after the other.

What stands at a draw is a pure function of (seed, name, draw) and the stream's documents: the filler cuts these into
shards and the shards into eras, always the same ones; a shard of n tokens has n // T windows; and era k's windows
are permuted by a key of (seed, name, k). The draws run through era 0, era 1, and so on through all epochs. A reader
follows the ledger of the cache, counts windows, and waits for eras that are not closed yet.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gpt2x.addresses import without_secrets
from gpt2x.batches.order import permute, round_keys
from gpt2x.batches.source import Source
from gpt2x.batches.windows import ConsecutiveWindows, Sequences
from gpt2x.config import StreamSection
from gpt2x.errors import UserError
from gpt2x.shards.files import Shard
from gpt2x.streams.cache import StreamCache
from gpt2x.streams.ledger import Beginning, Ledger, StreamShard, changes, ledger_of_json, shard_file
from gpt2x.tokenizers.bpe import load_tokenizer, tokenizer_fingerprint, vocabulary_size


# Not by its fields, which hold an array: an era is found by being the same object.
@dataclass(frozen=True, kw_only=True, eq=False)
class Era:
    """A closed era.

    Attributes:
        beginning: where it begins in the stream.
        shards: its shards.
        first_draw: how many windows all eras before it have.
        first_windows: (len(shards) + 1,), the windows of the era before each shard, and all of them.
    """

    beginning: Beginning
    shards: tuple[StreamShard, ...]
    first_draw: int
    first_windows: np.ndarray

    @property
    def end_draw(self) -> int:
        """The first draw of the next era."""
        return self.first_draw + int(self.first_windows[-1])


class StreamSource(Source):
    """The windows of a stream.

    Every process of a node has its own; that of one of them fills the cache. All threads of a process may share it.

    Attributes:
        definition: what determines the shards and their order.
        location: of the cache, for messages.
        tokenizer_dir: the tokenizer that makes the ids.
        tokenizer_fingerprint: of it.
        vocab_size: every id is below it.
        eos_token_id: ends every document.
        cache: its shards.
    """

    num_tokens = None
    num_windows = None

    def __init__(
        self,
        section: StreamSection,
        sequence_length: int,
        *,
        seed: int = 0,
        name: str = "train",
        fills: bool = True,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts the filler; waits for nothing.

        Args:
            section: the stream and its cache.
            sequence_length: T, tokens per window.
            seed: of the order within eras.
            name: see Source.
            fills: whether this process fills the cache; exactly one of each node does.
            state: of a checkpoint, to go on from there; of the same stream, with the same T.

        Raises:
            UserError: for a cache of another stream or in use by another run, for a state of another stream or
                another T, and for a tokenizer that cannot be loaded.
        """
        if section.tokens_per_shard < sequence_length:
            raise UserError(
                f"stream.tokens_per_shard ({section.tokens_per_shard}) must be at least data.sequence_length "
                f"({sequence_length}); raise it."
            )
        self.section, self.sequence_length, self.seed, self.name = section, sequence_length, seed, name
        self.location, self.tokenizer_dir = str(section.cache_dir), section.tokenizer
        tokenizer = load_tokenizer(section.tokenizer)
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self.vocab_size, self.eos_token_id = vocabulary_size(tokenizer), int(tokenizer.eos_token_id)
        self.definition = _definition(section, self.tokenizer_fingerprint)
        self.fingerprint = hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode()).hexdigest()
        self._eras: list[Era] = []
        self._draws_before = 0 if state is None else int(state["draws_before"])
        ledger = Ledger(definition=self.definition) if state is None else self._ledger_of(state)
        self.cache = StreamCache(section, name, ledger, tokenizer=tokenizer, fills=fills)

    def sequences(self, draws: np.ndarray) -> Sequences:
        """What stands at these draws; waits until it is there.

        Raises:
            UserError: where they never will be.
        """
        sequences = np.empty((len(draws), self.sequence_length), np.int64)
        for here, era, shards in self.cache.wait(lambda: self._opened(draws)):
            windows = ConsecutiveWindows(shards, self.sequence_length)
            sequences[here] = windows.sequences(self._windows(era, draws[here])).ids
        return Sequences(sequences)

    def locate(self, draw: int) -> str:
        """Epoch, era, file and position of a draw that is there."""
        with self.cache.lock:
            era = self._era_of(draw)
        assert era is not None, "a draw is located after it was read"
        (window,) = self._windows(era, np.array([draw]))
        number = int(np.searchsorted(era.first_windows, window, side="right") - 1)
        start = int(window - era.first_windows[number]) * self.sequence_length
        file = shard_file(self.section.cache_dir, era.shards[number].number)
        return (
            f"epoch {era.beginning.position.epoch}, era {era.beginning.era}, {file}, "
            f"tokens {start} to {start + self.sequence_length}"
        )

    def epochs(self, num_draws: int) -> float:
        """How often the stream was gone through completely; nobody knows how far it is to the next end."""
        with self.cache.lock:
            return float(self._beginning_at(num_draws)[0].position.epoch)

    def require(self, num_draws: int, *, first: int | None = None) -> None:
        """Waits until the draws below num_draws can be read.

        Args:
            num_draws: one more than the last one.
            first: the first that is needed together with them; eras before it are still to be released, so a full
                cache is waited for. By default the cache is as free as it gets.

        Raises:
            UserError: where the stream is broken for good, and where the cache has no room for all these draws.
        """
        self.cache.wait(lambda: self._has_draws(num_draws, first))

    def release(self, num_draws: int) -> None:
        """Says that no process of the node needs a draw below num_draws any more: eras before leave the cache."""
        with self.cache.lock:
            beginning, draws_before = self._beginning_at(num_draws)
            if beginning != self.cache.ledger.beginning:
                self._draws_before = draws_before
                self._eras = [era for era in self._eras if era.beginning.number >= beginning.number]
                self.cache.forget_before(beginning)

    def state(self, num_draws: int) -> dict[str, Any]:
        """The ledger from the era of this draw on, and how many draws are before: any machine goes on from it."""
        with self.cache.lock:
            beginning, draws_before = self._beginning_at(num_draws)
            known = self.cache.ledger
            ledger = Ledger(definition=self.definition, beginning=beginning, validation=known.validation)
            ledger.follow(known.shards.values())
        return {"sequence_length": self.sequence_length, "draws_before": draws_before, "ledger": ledger.as_json()}

    def validation_shards(self) -> tuple[list[Shard], int]:
        """The held-out documents of era 0 and how many UTF-8 bytes they have; waits until they are there.

        Raises:
            UserError: where there are none, and where the stream is broken for good.
        """
        fraction = self.section.corpus.validation_fraction
        shards, num_bytes = self.cache.wait(self.cache.validation) if fraction else ([], 0)
        if not shards:
            raise UserError(
                f"stream {self.name!r}: no document among those of its first shard is held out; raise "
                f"corpus.validation_fraction ({fraction}) or stream.tokens_per_shard "
                f"({self.section.tokens_per_shard})."
            )
        return shards, num_bytes

    def close(self) -> None:
        """Ends the filler, and whoever waits."""
        self.cache.close()

    def _ledger_of(self, state: Mapping[str, Any]) -> Ledger:
        if state["sequence_length"] != self.sequence_length:
            raise UserError(
                f"data.sequence_length ({self.sequence_length}) must stay what it was for stream {self.name!r} "
                f"({state['sequence_length']}), whose place is counted in sequences; set it back, or start a new run."
            )
        ledger = ledger_of_json(state["ledger"])
        if ledger.definition != self.definition:
            raise UserError(
                f"stream {self.name!r} is not the one of the checkpoint: "
                f"{changes(ledger.definition, self.definition)}; set it back, or start a new run."
            )
        return ledger

    def _follow(self) -> None:
        """Makes eras of what is new in the ledger."""
        self.cache.follow()
        shards: list[StreamShard] = []
        number = self._eras[-1].shards[-1].number + 1 if self._eras else self.cache.ledger.beginning.number
        while (shard := self.cache.ledger.shards.get(number)) is not None:
            shards.append(shard)
            number += 1
            if shard.ends_era:
                self._eras.append(self._era(shards))
                shards = []

    def _era(self, shards: list[StreamShard]) -> Era:
        first = shards[0]
        return Era(
            beginning=Beginning(era=first.era, number=first.number, position=first.start),
            shards=tuple(shards),
            first_draw=self._eras[-1].end_draw if self._eras else self._draws_before,
            first_windows=np.cumsum([0, *(shard.num_tokens // self.sequence_length for shard in shards)]),
        )

    def _era_of(self, draw: int) -> Era | None:
        """The era of a draw; None where it is not closed yet."""
        assert draw >= self._draws_before, f"draw {draw} was released"
        self._follow()
        return next((era for era in self._eras if draw < era.end_draw), None)

    def _beginning_at(self, num_draws: int) -> tuple[Beginning, int]:
        """Where the era of a draw begins, closed or not, and how many draws are before it."""
        if (era := self._era_of(num_draws)) is not None:
            return era.beginning, era.first_draw
        if not self._eras:
            return self.cache.ledger.beginning, self._draws_before
        last = self._eras[-1].shards[-1]
        return Beginning(era=last.era + 1, number=last.number + 1, position=last.end), self._eras[-1].end_draw

    def _opened(self, draws: np.ndarray) -> list[tuple[np.ndarray, Era, list[Shard]]] | None:
        """For every era which of the draws are in it, and its shards; None while one of them is not there."""
        found, rest = [], np.arange(len(draws))
        while rest.size:
            if (era := self._era_of(int(draws[rest].min()))) is None:
                return None
            if (shards := self._shards(era)) is None:
                return None
            is_here = draws[rest] < era.end_draw
            found.append((rest[is_here], era, shards))
            rest = rest[~is_here]
        return found

    def _shards(self, era: Era) -> list[Shard] | None:
        """An era's shards; None while one of them is not there."""
        shards = [self.cache.shard(shard.number) for shard in era.shards]
        there = [shard for shard in shards if shard is not None]
        return there if len(there) == len(shards) else None

    def _windows(self, era: Era, draws: np.ndarray) -> np.ndarray:
        keys = round_keys(self.seed, "era", self.name, era.beginning.era)
        return permute(draws - era.first_draw, era.end_draw - era.first_draw, keys)

    def _has_draws(self, num_draws: int, first: int | None) -> bool | None:
        """Whether the draws below num_draws, from the oldest needed on, can be read; None while they cannot."""
        if num_draws <= self._draws_before:
            return True
        if (last := self._era_of(num_draws - 1)) is not None:
            eras = self._eras[: self._eras.index(last) + 1]
            return True if all(self._shards(era) is not None for era in eras) else None
        self._check_windows()
        is_room_to_come = first is not None and self._beginning_at(first)[0] != self.cache.ledger.beginning
        if is_room_to_come or len(self.cache.ledger.shards) < self.section.max_cached_shards:
            return None
        raise UserError(
            f"stream {self.name!r}: the {num_draws - self._draws_before} sequences that one step needs at once are "
            f"more than the cache holds; raise stream.max_cached_shards ({self.section.max_cached_shards}) or "
            f"stream.tokens_per_shard, or lower train.tokens_per_step."
        )

    def _check_windows(self) -> None:
        """Refuses a stream that was gone through from beginning to end without one window."""
        if not self._eras or self._eras[-1].end_draw > self._eras[0].first_draw:
            return
        start, end = self._eras[0].beginning.position, self._eras[-1].shards[-1].end
        if start.state is None and end.epoch > start.epoch:
            longest = max(shard.num_tokens for era in self._eras for shard in era.shards)
            raise UserError(
                f"stream {self.name!r}: no shard has the {self.sequence_length} tokens of data.sequence_length; set "
                f"it to {longest} or less, or give more text."
            )


def _definition(section: StreamSection, fingerprint: str) -> dict[str, Any]:
    """What determines the shards and the eras, as JSON gives it back."""
    definition = {
        "corpus": without_secrets(asdict(section.corpus)),
        "tokenizer_fingerprint": fingerprint,
        "tokens_per_shard": section.tokens_per_shard,
        "shards_per_era": section.shards_per_era,
    }
    return json.loads(json.dumps(definition))
