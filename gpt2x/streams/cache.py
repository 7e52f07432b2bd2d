"""The cache of a stream as its readers see it: what the ledger says, the shards that are there, and waiting."""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from gpt2x.config import StreamSection
from gpt2x.config.streaming import FillerRecipe
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, discard, opened
from gpt2x.shards.files import Shard, open_shard
from gpt2x.shards.writer import Vocabulary
from gpt2x.streams.ledger import (
    Beginning,
    Ledger,
    changes,
    failure_file,
    ledger_file,
    read_failure,
    read_ledger,
    shard_file,
    validation_file,
)
from gpt2x.streams.process import FillerProcess
from gpt2x.tokenizers.bpe import is_saved, load_tokenizer, save_tokenizer, tokenizer_fingerprint

POLL_S = 0.02
# How long a failure that was there before this reader counts as that of an earlier run, whose successor removes it.
OLD_FAILURE_S = 30.0
Found = TypeVar("Found")


class StreamCache:
    """The shards of a stream from some era on. All threads of a process may share it.

    Attributes:
        ledger: what is known from the oldest era on that is needed.
        lock: to be held while the ledger is read together with something that depends on it.
        waited_s: how long threads have waited for the stream, in total.
    """

    def __init__(
        self, section: StreamSection, name: str, ledger: Ledger, *, tokenizer: PreTrainedTokenizerFast, fills: bool
    ) -> None:
        """Starts the filler where this process is the one that fills.

        Raises:
            UserError: for a cache of another stream, or in use by another run.
        """
        self.section, self.name, self.ledger, self.directory = section, name, ledger, section.cache_dir
        self.vocabulary = Vocabulary.of(tokenizer)
        self.lock, self.waited_s = threading.RLock(), 0.0
        self._closing, self._created_at = threading.Event(), time.monotonic()
        self._old_failure = _identity(failure_file(self.directory))
        self._tokenizer, self._shards = tokenizer, dict[int, Shard]()
        self._ledger_seen: tuple[int, int, int] | None = None
        self._filler = self._started_filler() if fills else None

    def wait(self, find: Callable[[], Found | None]) -> Found:
        """What `find` finds, as soon as it finds something; it is called with the lock held.

        Raises:
            UserError: where the stream is broken for good.
        """
        started, polls = time.monotonic(), 0
        while True:
            # Before the look: what the filler wrote down before it failed is still found.
            failure = self._failure()
            with self.lock:
                self._keep_filler_alive()
                if (found := find()) is not None:
                    self.waited_s += time.monotonic() - started if polls else 0.0
                    return found
            if failure is not None:
                raise UserError(failure)
            polls += 1
            if self._closing.wait(POLL_S):
                raise RuntimeError(f"stream {self.name!r} was closed while it was waited for.")

    def follow(self) -> None:
        """Takes over what is new in the ledger's file."""
        try:
            found = ledger_file(self.directory).stat()
        except OSError:  # not there yet, or a link that leads nowhere, which the filler replaces
            return
        if (seen := (found.st_mtime_ns, found.st_ino, found.st_size)) != self._ledger_seen:
            cached = read_ledger(self.directory)
            if cached is not None and cached.definition == self.ledger.definition:
                self.ledger.follow(cached.shards.values())
                self.ledger.validation = self.ledger.validation or cached.validation
                self._ledger_seen = seen

    def shard(self, number: int) -> Shard | None:
        """A shard of the ledger; None while it is not there. A damaged one is deleted, so that it is made anew."""
        if number not in self._shards:
            found = _opened(shard_file(self.directory, number), self.ledger.shards[number].sha256)
            if found is None:
                return None
            self._shards[number] = found
        return self._shards[number]

    def validation(self) -> tuple[list[Shard], int] | None:
        """The shard of held-out documents, if there are any, and their UTF-8 bytes; None while that is not known."""
        self.follow()
        if (entry := self.ledger.validation) is None:
            return None
        if entry.num_documents == 0:
            return [], 0
        shard = _opened(validation_file(self.directory), entry.sha256)
        return None if shard is None else ([shard], entry.num_bytes)

    def forget_before(self, beginning: Beginning) -> None:
        """Lets go of the shards before an era; the filler deletes them."""
        self.ledger.forget_before(beginning)
        self._shards = {number: shard for number, shard in self._shards.items() if number >= beginning.number}
        if self._filler is not None:
            self._filler.forget_before(beginning)

    def close(self) -> None:
        """Ends the filler, and whoever waits."""
        self._closing.set()
        with self.lock:
            if self._filler is not None:
                self._filler.close()
                self._filler = None

    @property
    def filler_pid(self) -> int | None:
        """The filler's process id, where this process has one."""
        return self._filler.pid if self._filler is not None else None

    def _started_filler(self) -> FillerProcess:
        filler = FillerProcess(self.name, self.directory)
        try:
            self._check_cache()
            filler.start(self._recipe())
        except BaseException:
            filler.close()
            raise
        return filler

    def _check_cache(self) -> None:
        cached = read_ledger(self.directory)
        if cached and (changed := changes(cached.definition, self.ledger.definition)):
            raise UserError(
                f"stream.cache_dir '{self.directory}' holds another stream ({changed}); set another cache_dir, or "
                f"delete that directory."
            )

    def _recipe(self) -> FillerRecipe:
        _keep_tokenizer(self._tokenizer, self.directory / "tokenizer")
        return FillerRecipe(
            name=self.name,
            cache_dir=str(self.directory),
            corpus=asdict(self.section.corpus),
            vocabulary=asdict(self.vocabulary),
            tokens_per_shard=self.section.tokens_per_shard,
            shards_per_era=self.section.shards_per_era,
            max_cached_shards=self.section.max_cached_shards,
            retry_s=self.section.retry_s,
            stall_s=self.section.stall_s,
            ledger=self.ledger.as_json(),
        )

    def _keep_filler_alive(self) -> None:
        if self._filler is not None:
            self._filler.keep_alive(self._recipe)

    def _failure(self) -> str | None:
        """Why the stream is broken for good, if it is."""
        if (identity := _identity(failure_file(self.directory))) is None:
            return None
        is_old = identity == self._old_failure and time.monotonic() < self._created_at + OLD_FAILURE_S
        return None if is_old else read_failure(self.directory)


def _identity(file: Path) -> tuple[int, ...] | None:
    """What another file of this name does not have, whatever clock it was written by; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _keep_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Saves the tokenizer for the filler, which does not load transformers."""
    wanted = tokenizer_fingerprint(tokenizer)
    if not is_saved(directory) or tokenizer_fingerprint(load_tokenizer(directory)) != wanted:
        save_tokenizer(tokenizer, directory, replaces=True)


def _opened(file: Path, sha256: str) -> Shard | None:
    """The shard with this content, or None; a file with another content is deleted."""
    try:
        with opened(file) as content:
            if hashlib.file_digest(content, "sha256").hexdigest() == sha256:
                return open_shard(file)
    except DamagedError:
        pass
    if not file.is_dir():
        discard(file)
    return None
