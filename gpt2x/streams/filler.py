"""The filler: a process that keeps the shards of a stream's cache there from the oldest needed one on.

It knows two things to do. A shard that is missing, for whatever reason, is made: one that is in the ledger from the
place recorded there, and to the same sha256; a new one from where the last one ends. (A damaged one is deleted by the
reader that finds it, and so is missing.) And what is older than the oldest needed era is deleted. The reader says
which era that is; its silence for good, when it closes the pipe or is killed, ends the filler. Killed itself at any
moment, it goes on from the files when it is started again.

Neither torch nor transformers is imported here: it starts in two seconds and needs less than 400 MB.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import cast

import datasets
import numpy as np
from tokenizers import Tokenizer

from gpt2x.addresses import without_secrets
from gpt2x.config import CorpusSection
from gpt2x.config.streaming import FillerRecipe
from gpt2x.errors import UserError
from gpt2x.files import discard, locked, make_directory
from gpt2x.shards.index import ShardEntry, split_directory
from gpt2x.shards.writer import Vocabulary, write_documents
from gpt2x.streams.cutting import Cutter, Documents, Piece
from gpt2x.streams.ledger import (
    Beginning,
    Ledger,
    LedgerContent,
    Position,
    StreamShard,
    beginning_of_json,
    ledger_of_json,
    read_ledger,
    shard_file,
    validation_file,
    write_failure,
)
from gpt2x.streams.reading import Patience, StreamBrokenError, read_rows

# How often a full cache is looked at for shards that someone else deleted.
LOOK_S = 0.2


def main() -> None:
    """Fills until standard input is closed."""
    # datasets' own retries keep a file open where it is, which saves reading it again; when they are used up within
    # seconds, ours begin.
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 3
    datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 1
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 1
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 5
    # A request that counts downloads, sent for local files too; without a network it takes seconds to fail.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    # Without a buffer, which the thread below would hold locked when the interpreter ends.
    orders = FileIO(sys.stdin.fileno(), closefd=False)
    recipe = FillerRecipe(**json.loads(orders.readline()))
    # The filler of a run that was killed may need a moment to end.
    with locked(Path(recipe.cache_dir) / "filler.lock", waits=True):
        filler = Filler(recipe)
        threading.Thread(target=_obey, args=[filler, orders], daemon=True).start()
        fill(filler)
        # The threads that wait for the network are not waited for.
        os._exit(1)


def _obey(filler: "Filler", orders: FileIO) -> None:
    for line in orders:
        filler.forget_before(beginning_of_json(json.loads(line)))
    os._exit(0)


def fill(filler: "Filler") -> None:
    """Fills until something happens that cannot be mended, and records what."""
    name = filler.recipe.name
    try:
        filler.run()
    except StreamBrokenError as error:
        where = ", ".join(filler.corpus.data_files[:3]) or filler.corpus.dataset
        message = (
            f"stream {name!r} ({where}) is broken: {error}; see to the connection and the source (stream.retry_s is "
            f"{filler.patience.retry_s:g}), then start the same command again: it goes on where it stands."
        )
    except UserError as error:
        message = f"stream {name!r}: {error}"
    write_failure(filler.cache_dir, without_secrets(message))


class Filler:
    """See the module. Two threads use it: one fills, the other one says what is needed no more."""

    def __init__(self, recipe: FillerRecipe) -> None:
        self.recipe, self.cache_dir = recipe, Path(recipe.cache_dir)
        self.corpus = CorpusSection(**recipe.corpus)
        self.vocabulary = Vocabulary(**recipe.vocabulary)
        self.patience = Patience(retry_s=recipe.retry_s, stall_s=recipe.stall_s)
        self.ledger = self._known()
        self._needed = threading.Condition()
        self._beginning = self.ledger.beginning
        # The pieces from a shard on, as long as one is wanted after the other.
        self._pieces: Iterator[Piece] = iter(())
        self._next_piece: int | None = None

    def run(self) -> None:
        """Fills for good."""
        self._tidy()
        self.ledger.write(self.cache_dir)
        while True:
            if not self._has_validation():
                self._fill_validation()
            if (number := self._missing()) is not None:
                self._fill(number)
            with self._needed:
                if number is None and self._beginning == self.ledger.beginning:
                    self._needed.wait(LOOK_S)
                beginning = self._beginning
            if beginning != self.ledger.beginning:
                self.ledger.forget_before(beginning)
                self._tidy()
                self.ledger.write(self.cache_dir)

    def forget_before(self, beginning: Beginning) -> None:
        """Says what the oldest needed era is; called from another thread."""
        with self._needed:
            self._beginning = beginning
            self._needed.notify()

    def _known(self) -> Ledger:
        """What the reader knows, and what the cache knows beyond that."""
        ledger, cached = ledger_of_json(cast(LedgerContent, self.recipe.ledger)), read_ledger(self.cache_dir)
        if cached is not None and cached.definition == ledger.definition:
            ledger.follow(cached.shards.values())
            ledger.validation = ledger.validation or cached.validation
        return ledger

    def _wanted(self) -> range:
        """The numbers of the shards that there is room for, from the oldest needed one on."""
        first = self.ledger.beginning.number
        return range(first, first + self.recipe.max_cached_shards)

    def _missing(self) -> int | None:
        """The first shard to make; all before it are there."""
        return next((number for number in self._wanted() if not shard_file(self.cache_dir, number).is_file()), None)

    def _tidy(self) -> None:
        """Deletes what is not wanted and what no ledger tells the truth about."""
        for directory in ("train", "validation"):
            make_directory(split_directory(self.cache_dir, directory))
        kept = {shard_file(self.cache_dir, number) for number in self._wanted() if number in self.ledger.shards}
        for file in (self.cache_dir / "train").iterdir():
            if file not in kept and not file.is_dir():  # a directory is none of ours
                discard(file)

    def _has_validation(self) -> bool:
        if not self.corpus.validation_fraction:
            return True
        known = self.ledger.validation
        return known is not None and (known.num_documents == 0 or validation_file(self.cache_dir).is_file())

    def _fill_validation(self) -> None:
        """Goes through era 0, which is the only one that held-out documents are taken from."""
        piece = self._piece(0, Position())
        entry = self._write(validation_file(self.cache_dir), piece.held_out)
        if self.ledger.validation not in (None, entry):
            raise self._changed("validation shard")
        self.ledger.validation = entry
        self.ledger.write(self.cache_dir)
        if self.ledger.beginning.number == 0 and not shard_file(self.cache_dir, 0).is_file():
            self._record(0, piece)

    def _fill(self, number: int) -> None:
        self._record(number, self._piece(number, self.ledger.start_of(number)))

    def _piece(self, number: int, start: Position) -> Piece:
        """The piece of a shard; the stream is opened anew where it is not the one after the last."""
        if number != self._next_piece:
            cutter = Cutter(
                self.corpus,
                _tokenizer(self.cache_dir),
                self.vocabulary,
                tokens_per_shard=self.recipe.tokens_per_shard,
            )
            was_open = bool(self.ledger.shards or self.ledger.validation)
            self._pieces = cutter.cut(read_rows(self.corpus, start, self.patience, was_open=was_open), start)
        piece = next(self._pieces)
        self._next_piece = number + 1 if piece.end.epoch == start.epoch else None
        return piece

    def _record(self, number: int, piece: Piece) -> None:
        """Writes a shard and puts it down in the ledger; one that is there already must come out the same."""
        known = self.ledger.shards.get(number)
        if not piece.documents.ids:
            raise self._changed(f"shard {number}") if known or piece.start != Position() else self._empty(piece)
        entry = self._write(shard_file(self.cache_dir, number), piece.documents)
        if known is None:
            self.ledger.shards[number] = self._shard(number, piece, entry)
            self.ledger.write(self.cache_dir)
        elif known.sha256 != entry.sha256:
            discard(shard_file(self.cache_dir, number))
            raise self._changed(f"shard {number}")

    def _shard(self, number: int, piece: Piece, entry: ShardEntry) -> StreamShard:
        era = self.ledger.next.era
        place = sum(shard.era == era for shard in self.ledger.shards.values())
        is_full = era == 0 or place + 1 == self.recipe.shards_per_era
        return StreamShard(
            **vars(entry),
            number=number,
            era=era,
            ends_era=is_full or piece.end.epoch > piece.start.epoch,
            # Not the piece's own: datasets spells one place in several ways.
            start=self.ledger.start_of(number),
            end=piece.end,
            left_out=dict(piece.left_out),
        )

    def _write(self, file: Path, documents: Documents) -> ShardEntry:
        """Writes a shard; none for no documents."""
        if not documents.ids:
            return ShardEntry(file=file.name, num_tokens=0, num_documents=0, num_bytes=0, sha256="")
        tokens, starts = np.concatenate(documents.ids), documents.starts()
        return write_documents(file, self.vocabulary, tokens=tokens, starts=starts, num_bytes=documents.num_bytes)

    def _changed(self, what: str) -> UserError:
        return UserError(
            f"{what} was streamed again and is not what it was: {self.corpus.dataset} "
            f"{' '.join(self.corpus.data_files[:3])} has changed; restore it as it was, or start a new run with "
            f"another stream.cache_dir."
        )

    def _empty(self, piece: Piece) -> UserError:
        found = ", ".join(f"{count} {reason}" for reason, count in sorted(piece.left_out.items())) or "no rows"
        return UserError(f"the stream has no document to train on ({found}); give it some text.")


def _tokenizer(cache_dir: Path) -> Tokenizer:
    """The tokenizer as a reader of documents: text that spells a special token stays text."""
    tokenizer = Tokenizer.from_file(str(cache_dir / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
