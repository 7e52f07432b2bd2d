"""index.json: what a directory of token shards holds. It is written last, so where it is, the data is whole."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from gpt2x.errors import UserError
from gpt2x.files import DamagedError, parse_json, read_bytes, write_file
from gpt2x.locate import does_not_exist
from gpt2x.scan import Scan, scan_all
from gpt2x.shards.files import REMEDY, Shard, open_shard

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
INDEX_FILE = "index.json"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard of a split, as the index lists it."""

    file: str
    """Name inside the split's directory."""
    num_tokens: int
    """Tokens, the end of text after every document, or what ends a conversation, included."""
    num_documents: int
    """Documents."""
    num_bytes: int
    """UTF-8 bytes of the documents; of what is learned of conversations."""
    sha256: str
    """Of the file, in hexadecimal."""


class ShardEntryContent(TypedDict):
    """A ShardEntry in a file."""

    file: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    sha256: str


class _Splits(TypedDict):
    train: list[ShardEntryContent]
    validation: list[ShardEntryContent]


class _Version(TypedDict):
    format_version: int


class _Content(_Version):
    splits: _Splits
    tokenizer_fingerprint: str
    vocab_size: int
    eos_token_id: int
    recipe: dict[str, Any]
    dropped: NotRequired[dict[str, int]]
    sha256: NotRequired[str]  # of the rest; earlier versions wrote none


@dataclass(frozen=True, kw_only=True)
class Index:
    """The content of index.json."""

    directory: Path
    """Where the shards are; not part of the file."""
    splits: Mapping[str, Sequence[ShardEntry]]
    """The shards of train and of validation, in order."""
    tokenizer_fingerprint: str
    """Of the tokenizer that made the ids."""
    vocab_size: int
    """Every id is below it."""
    eos_token_id: int
    """The id that ends every plain document; of conversations what ends the assistant's turn."""
    recipe: Mapping[str, Any]
    """What the data was made of: corpus, split seed and fraction, tokens per shard, how conversations are written."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Documents that were left out, by reason."""

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer, kept beside the shards that it made."""
        return self.directory / "tokenizer"

    @property
    def location(self) -> str:
        """The directory, for messages."""
        return str(self.directory)

    def split_fingerprint(self, split: str) -> str:
        """A sha256 over the split's shards: the same wherever the same data lies."""
        return combined_sha256(entry.sha256 for entry in self.splits[split])

    def has_split(self, split: str) -> bool:
        """Whether there are shards of train or of validation."""
        return bool(self.splits[split])

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of a split's documents."""
        return self.total(split, "num_bytes")

    def total(self, split: str, count: str) -> int:
        """The sum of num_tokens, num_documents or num_bytes over a split's shards."""
        return sum(getattr(entry, count) for entry in self.splits[split])

    def open_split(self, split: str) -> list[Shard]:
        """Opens a split's shards and checks each against its entry; one that is new here is read through once.

        Raises:
            UserError: for a split without shards, a shard that is not the one the index lists, to the last bit, and
                an id outside the vocabulary.
        """
        if not self.splits[split]:
            raise UserError(
                f"{self.directory} holds no {split} tokens; prepare it again with corpus.validation_fraction above 0."
            )
        directory = split_directory(self.directory, split)
        shards = [self._open(directory / entry.file, entry) for entry in self.splits[split]]
        scans = scan_all([(shard.file, shard.tokens) for shard in shards])
        return [self._checked(*opened) for opened in zip(shards, self.splits[split], scans, strict=True)]

    def _open(self, file: Path, entry: ShardEntry) -> Shard:
        if file.is_symlink():
            raise UserError(f"{file} must not be a link; copy the shard itself there.")
        shard = open_shard(file)
        found = (shard.tokens.size, shard.documents.size - 1, shard.metadata.get("tokenizer_fingerprint"))
        if found != (entry.num_tokens, entry.num_documents, self.tokenizer_fingerprint):
            raise UserError(
                f"{file}: {INDEX_FILE} lists {entry.num_tokens} tokens and {entry.num_documents} documents of "
                f"tokenizer {self.tokenizer_fingerprint[:8]}, the file has {found[0]}, {found[1]} and "
                f"{str(found[2])[:8]}; {REMEDY}."
            )
        return shard

    def _checked(self, shard: Shard, entry: ShardEntry, found: Scan) -> Shard:
        """Compares the content with the entry and the vocabulary."""
        if found["sha256"] != entry.sha256:
            raise UserError(
                f"{shard.file}: its content has changed ({INDEX_FILE} lists sha256 {entry.sha256[:12]}, the file has "
                f"{found['sha256'][:12]}); {REMEDY}."
            )
        shard = dataclasses.replace(shard, id_range=(found["smallest_id"], found["largest_id"]))
        shard.check_token_ids(self.vocab_size)
        return shard


def split_directory(directory: Path, split: str) -> Path:
    """Where the shards of a split lie; it need not be there yet.

    Raises:
        UserError: where it is a link: a preparation deletes there what it does not list, and a copy of the data would
            lack it. The whole directory may be one.
    """
    place = directory / split
    if place.is_symlink():
        raise UserError(f"{place} must not be a link; put the folder itself there, or make '{directory}' the link.")
    return place


def combined_sha256(hashes: Iterable[str]) -> str:
    """One sha256 for several, in their order."""
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def write_index(index: Index) -> None:
    """Writes index.json."""
    content: dict[str, Any] = {"format_version": FORMAT_VERSION, **dataclasses.asdict(index)}
    del content["directory"]
    content["sha256"] = _sha256(content)
    write_file(index.directory / INDEX_FILE, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def _sha256(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_index(directory: Path) -> Index:
    """Reads and checks index.json; opens no shard.

    Raises:
        UserError: where it is missing, broken, of another format version, or names a file outside its directory.
    """
    file = directory / INDEX_FILE
    if not os.path.lexists(directory):
        raise does_not_exist(str(directory), "a directory of token shards, as scripts/prepare_data.py makes it")
    if not os.path.lexists(file):
        raise UserError(f"'{directory}' holds no token shards ({INDEX_FILE}); make them by scripts/prepare_data.py.")
    try:
        text = read_bytes(file)
        if parse_json(text, _Version, where=str(file))["format_version"] != FORMAT_VERSION:
            raise UserError(f"{file} is not of format version {FORMAT_VERSION}; prepare the data again.")
        content = parse_json(text, _Content, where=str(file))
        if "sha256" in content and content["sha256"] != _sha256(json.loads(text)):
            raise DamagedError(f"{file} is not what was written there (its own sha256 differs)")
    except DamagedError as error:
        raise UserError(f"{error}; delete it and prepare the data again.") from None
    splits = {"train": content["splits"]["train"], "validation": content["splits"]["validation"]}
    for entries in splits.values():
        _check_names(file, [entry["file"] for entry in entries])
    return Index(
        directory=directory,
        splits={split: tuple(entry_of(entry) for entry in entries) for split, entries in splits.items()},
        tokenizer_fingerprint=content["tokenizer_fingerprint"],
        vocab_size=content["vocab_size"],
        eos_token_id=content["eos_token_id"],
        recipe=content["recipe"],
        dropped=content.get("dropped", {}),
    )


def content_of(entry: ShardEntry) -> ShardEntryContent:
    """The entry as it stands in a file."""
    return ShardEntryContent(**dataclasses.asdict(entry))  # type: ignore[typeddict-item]


def entry_of(content: ShardEntryContent) -> ShardEntry:
    """What content_of gave, without keys that a later version may have added."""
    return ShardEntry(**{field.name: content[field.name] for field in dataclasses.fields(ShardEntry)})  # type: ignore[literal-required]


def _check_names(index_file: Path, names: Sequence[str]) -> None:
    """An index may come from a stranger: it must not reach outside its directory."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name in (".", ".."):
            raise UserError(f"{index_file}: {name!r} must be a plain file name; delete the index and prepare again.")
        if names.count(name) > 1:
            raise UserError(f"{index_file}: {name!r} is listed twice; delete the index and prepare the data again.")
