"""The ledger of a stream's cache: which shards the stream was cut into, and where in the stream each begins and ends.

    cache_dir/tokenizer/            what makes the ids
    cache_dir/train/                the shards that there is room for
    cache_dir/validation/           the held-out documents among those of era 0
    cache_dir/ledger.json           this file's business
    cache_dir/failure.json          why the stream is broken for good, if it is

Only the filler writes the ledger, each time as a whole, so every reader finds one that is true. A shard is written
down after it is on the disk, and stays in the ledger when its file goes: the place where it begins and its sha256 are
enough to make it again. Everything is JSON, and a checkpoint holds the part of it that it needs.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from gpt2x.addresses import without_secrets
from gpt2x.files import DamagedError, make_directory, read_json, write_file
from gpt2x.shards.index import ShardEntry, ShardEntryContent, entry_of


class _PositionContent(TypedDict):
    epoch: int
    state: dict[str, Any] | None


class _BeginningContent(TypedDict):
    era: int
    number: int
    position: _PositionContent


class _StreamShardContent(ShardEntryContent):
    number: int
    era: int
    ends_era: bool
    start: _PositionContent
    end: _PositionContent
    left_out: NotRequired[dict[str, int]]


class LedgerContent(TypedDict):
    """A Ledger as plain data."""

    definition: dict[str, Any]
    beginning: _BeginningContent
    validation: ShardEntryContent | None
    shards: list[_StreamShardContent]


class _FailureContent(TypedDict):
    message: str


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in the stream: just before a row."""

    epoch: int = 0
    """How often the stream was gone through before."""
    state: dict[str, Any] | None = None
    """What state_dict() of the dataset gave there; None at the beginning of the epoch."""


@dataclass(frozen=True, kw_only=True)
class StreamShard(ShardEntry):
    """A shard of the training documents."""

    number: int
    """Shards are numbered through all epochs."""
    era: int
    """Shards of an era are shuffled together."""
    ends_era: bool
    """Whether it is the last one of its era."""
    start: Position
    """Where its documents begin."""
    end: Position
    """Where those of the next shard begin."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Documents between start and end that are not in the shard, by reason."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Where an era begins."""

    era: int = 0
    number: int = 0
    """Of its first shard."""
    position: Position = field(default_factory=Position)
    """Where that shard's documents begin."""


# They pass over keys that a later version may have added.
_BEGINNING, _SHARD = TypeAdapter(Beginning), TypeAdapter(StreamShard)


@dataclass(kw_only=True)
class Ledger:
    """What is known of a stream from some era on.

    Attributes:
        definition: what determines the shards: corpus, tokenizer, tokens per shard, shards per era.
        beginning: where the oldest era begins that is still needed.
        shards: those from there on by their numbers, without a gap.
        validation: the shard of held-out documents, of zero documents where there are none; None until known.
    """

    definition: Mapping[str, Any]
    beginning: Beginning = field(default_factory=Beginning)
    shards: dict[int, StreamShard] = field(default_factory=dict)
    validation: ShardEntry | None = None

    @property
    def next(self) -> Beginning:
        """The number, era and position of the shard after the last one."""
        if not self.shards:
            return self.beginning
        last = self.shards[max(self.shards)]
        return Beginning(era=last.era + last.ends_era, number=last.number + 1, position=last.end)

    def start_of(self, number: int) -> Position:
        """Where a shard begins: one that is known, or the next."""
        return self.shards[number].start if number in self.shards else self.next.position

    def follow(self, shards: Iterable[StreamShard]) -> None:
        """Takes over the shards that continue this ledger without a gap, and no others."""
        by_number = {shard.number: shard for shard in shards}
        while (found := by_number.get(self.next.number)) and (found.start, found.era) == (
            self.next.position,
            self.next.era,
        ):
            self.shards[found.number] = found

    def take_over(self, cache_dir: Path) -> bool:
        """Takes over what a cache's ledger knows beyond this one; False where it has none of the same stream."""
        cached = read_ledger(cache_dir)
        if cached is None or cached.definition != self.definition:
            return False
        self.follow(cached.shards.values())
        self.validation = self.validation or cached.validation
        return True

    def forget_before(self, beginning: Beginning) -> None:
        """Drops what came before an era."""
        self.shards = {number: shard for number, shard in self.shards.items() if number >= beginning.number}
        self.beginning = beginning

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data; ledger_of_json reads it back."""
        return {
            "definition": dict(self.definition),
            "beginning": asdict(self.beginning),
            "validation": self.validation and asdict(self.validation),
            "shards": [asdict(self.shards[number]) for number in sorted(self.shards)],
        }

    def write(self, cache_dir: Path) -> None:
        """Replaces the cache's ledger."""
        write_file(ledger_file(cache_dir), (json.dumps(self.as_json(), indent=1) + "\n").encode())


def ledger_of_json(content: LedgerContent) -> Ledger:
    """What Ledger.as_json gave."""
    return Ledger(
        definition=without_secrets(content["definition"]),  # older versions kept them
        beginning=beginning_of_json(content["beginning"]),
        shards={shard["number"]: _SHARD.validate_python(shard) for shard in content["shards"]},
        validation=entry_of(content["validation"]) if content["validation"] else None,
    )


def beginning_of_json(content: _BeginningContent) -> Beginning:
    """What asdict gave."""
    return _BEGINNING.validate_python(content)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """How two definitions differ, for messages; nothing where they do not."""
    differing = [key for key in after if before.get(key) != after[key]]
    return ", ".join(f"{key} {before.get(key)!r} -> {after[key]!r}" for key in differing)


def read_ledger(cache_dir: Path) -> Ledger | None:
    """The cache's ledger; None where there is none, or only a damaged one: then the cache is filled anew."""
    try:
        return ledger_of_json(read_json(ledger_file(cache_dir), LedgerContent))
    except DamagedError:
        return None


def ledger_file(cache_dir: Path) -> Path:
    """Where the ledger is."""
    return cache_dir / "ledger.json"


def failure_file(cache_dir: Path) -> Path:
    """Where it says why the stream is broken for good."""
    return cache_dir / "failure.json"


def write_failure(cache_dir: Path, message: str) -> None:
    """Says to every reader why no more shards will come, in one line."""
    make_directory(cache_dir)
    write_file(failure_file(cache_dir), json.dumps({"message": message}).encode())


def read_failure(cache_dir: Path) -> str | None:
    """What write_failure said; None where it did not, or what it wrote is damaged: then it will be written again."""
    try:
        return read_json(failure_file(cache_dir), _FailureContent)["message"]
    except DamagedError:
        return None


def shard_file(cache_dir: Path, number: int) -> Path:
    """Where a training shard is, if there is room for it."""
    return cache_dir / "train" / f"tokens_part_{number:05d}.safetensors"


def validation_file(cache_dir: Path) -> Path:
    """Where the held-out documents are."""
    return cache_dir / "validation" / "tokens_part_00000.safetensors"
