"""What the tasks of a preparation have finished, on disk."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from typing_extensions import TypedDict

from gpt2x.addresses import without_secrets
from gpt2x.config import CorpusSection, PreparationRecipe
from gpt2x.config.checks import shown
from gpt2x.corpus.dataset_rows import dataset_revision
from gpt2x.corpus.rows import listed
from gpt2x.corpus.source_files import source_files
from gpt2x.corpus.sources import (
    OtherDataError,
    SourceFile,
    SourceRecord,
    changes,
    date_of,
    identity_of,
    look_at,
    read_record,
    with_sha256,
    write_record,
)
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, locked, make_directory, read_json, write_file
from gpt2x.shards.index import INDEX_FILE, Index, ShardEntryContent, load_index
from gpt2x.tokenizers.bpe import tokenizer_fingerprint, vocabulary_size
from gpt2x.tokenizers.chat_template import chat_tokenizer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe and its tokenizer, and what both come to."""

    recipe: PreparationRecipe
    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    """Every id is below it."""
    made_of: dict[str, Any]
    """What determines the shards, as JSON gives it back."""

    @property
    def output_dir(self) -> Path:
        """Where the shards go."""
        return self.recipe.output_dir

    @property
    def fingerprint(self) -> str:
        """The tokenizer's."""
        return self.made_of["tokenizer_fingerprint"]


class TaskRecord(TypedDict):
    """What a finished task made, and of what."""

    made_of: dict[str, Any]
    plan: str
    splits: dict[str, list[ShardEntryContent]]
    dropped: dict[str, int]
    sha256: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The files of a preparation that is under way, which are those of its plan."""

    files: dict[str, Path]
    """In order, by the names under which they are recorded."""
    found: list[SourceFile]
    """As they are now."""
    revision: str | None
    """The commit of a dataset of the Hub, as far as it is known."""
    plan: str
    """The identity of the recorded plan; a task of another one does not count."""


def plan_of(recipe: PreparationRecipe, tokenizer: PreTrainedTokenizerFast) -> Plan:
    """Works out the fingerprint, which takes a fifth of a second for a large vocabulary, once.

    Raises:
        UserError: where the recipe's chat section does not fit the tokenizer.
    """
    if recipe.chat is not None:
        tokenizer = chat_tokenizer(tokenizer, recipe.chat)
    made_of = {
        **without_secrets(dataclasses.asdict(recipe.corpus)),
        "tokens_per_shard": recipe.tokens_per_shard,
        "num_tasks": recipe.num_tasks,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    if recipe.chat is not None:
        # What the template says, not where it lies.
        made_of["chat"] = {**dataclasses.asdict(recipe.chat), "template": tokenizer.chat_template}
    return Plan(recipe=recipe, tokenizer=tokenizer, vocab_size=vocabulary_size(tokenizer), made_of=made_of)


def finished_index(plan: Plan) -> Index | None:
    """The finished data in output_dir, if there is any; it must be of this recipe and of the texts that are there.

    Data cut into another number of tasks are the same documents and count.

    Raises:
        OtherDataError: with what has changed.
    """
    if not (plan.output_dir / INDEX_FILE).is_file():
        return None
    index = load_index(plan.output_dir)
    # An index does not list the fields that came after it; they had no effect.
    found = {**dataclasses.asdict(CorpusSection()), **_flat(without_secrets(index.recipe))}
    wanted = _flat(plan.made_of)
    has_chat = found.get("chat") == wanted.get("chat")
    keys = [key for key in wanted | found if (has_chat or not key.startswith("chat.")) and key in {*wanted, "chat"}]
    changed = [f"{k} {_shown(found.get(k))} -> {_shown(wanted.get(k))}" for k in keys if found.get(k) != wanted.get(k)]
    if changed:
        raise OtherDataError(f"'{plan.output_dir}' holds data of another recipe ({', '.join(changed)})")
    _check_sources(plan.output_dir, plan.recipe.corpus)
    return index


def _check_sources(directory: Path, corpus: CorpusSection) -> None:
    """Compares the texts of finished data with those that are there, if both are known."""
    record = read_record(directory)
    files = _present_files(corpus, record) if record is not None else {}
    if record is None or not record["files"] or not files:
        return
    if changed := changes(record["files"], look_at(files), files):
        date = date_of(directory / INDEX_FILE)
        raise OtherDataError(f"'{directory}' was prepared on {date} from other texts ({listed(changed, most=3)})")


def _present_files(corpus: CorpusSection, record: SourceRecord) -> dict[str, Path]:
    """The corpus' files; where a path of it matches nothing any more, those that are left; none where none is."""
    try:
        return source_files(corpus)
    except UserError:
        return {file["name"]: Path(file["name"]) for file in record["files"] if Path(file["name"]).is_file()}


def describe_finished(index: Index, corpus: CorpusSection) -> str:
    """One line on finished data that are taken as they are."""
    record = read_record(index.directory)
    num_files = "" if record is None or not record["files"] else f"from {len(record['files']):,} files "
    num_tokens = sum(index.total(split, "num_tokens") for split in index.splits)
    line = f"{index.directory}: already prepared on {date_of(index.directory / INDEX_FILE)} {num_files}"
    line += f"({num_tokens:,} tokens)"
    if record is None:
        return f"{line}; of what is not recorded, so the texts are not compared"
    if not _present_files(corpus, record):
        return f"{line}; the texts are not on this machine, and not compared"
    return line


def planned_sources(plan: Plan) -> Sources:
    """The files that the tasks read, as the first of them recorded them.

    A task that starts finds the same files or refuses. As long as no task is finished, nothing depends on the record,
    and it is made anew.

    Raises:
        UserError: where files have changed since, were added or are gone.
    """
    files = source_files(plan.recipe.corpus)
    found = look_at(files)
    now = (plan.made_of, found)
    make_directory(tasks_dir(plan.output_dir))
    with locked(tasks_dir(plan.output_dir) / "plan.lock", waits=True):
        record = read_record(plan.output_dir)
        if record is None or not (_is_begun(plan, record) or (record["made_of"], record["files"]) == now):
            record = record_of(plan, found, revision=dataset_revision(plan.recipe.corpus))
            write_record(plan.output_dir, record)
    known = _known_sha256(plan, record) if record["files"] != found else {}
    then = [with_sha256(file, known) for file in record["files"]]
    # Where files are dealt out to the tasks, one that no finished task has read is in no shard.
    if changed := changes(then, found, files, is_partly_read=len(files) >= plan.recipe.num_tasks):
        raise UserError(
            f"'{plan.output_dir}' holds parts made of other texts ({listed(changed, most=3)}); restore them, set "
            f"another output_dir, or delete that directory."
        )
    return Sources(files=files, found=found, revision=record.get("revision"), plan=identity_of(record))


def record_of(plan: Plan, files: list[SourceFile], *, revision: str | None) -> SourceRecord:
    """What is recorded of a preparation's sources."""
    return SourceRecord(made_of=plan.made_of, tokenizer=plan.recipe.tokenizer.path, files=files, revision=revision)


def _is_begun(plan: Plan, record: SourceRecord) -> bool:
    """Whether a task of this very record is finished."""
    if record["made_of"] != plan.made_of:
        return False
    wanted = identity_of(record)
    return any(_read(plan, task, wanted) is not None for task in range(plan.recipe.num_tasks))


def _known_sha256(plan: Plan, record: SourceRecord) -> dict[str, str]:
    wanted = identity_of(record)
    records = (_read(plan, task, wanted) for task in range(plan.recipe.num_tasks))
    return {name: value for found in records if found for name, value in found["sha256"].items()}


def _flat(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Without the number of tasks, and with the fields of chat beside the others."""
    flat = {key: value for key, value in made_of.items() if key not in ("num_tasks", "chat")}
    chat = made_of.get("chat")
    return (
        flat
        if not isinstance(chat, dict)
        else {**flat, "chat": True, **{f"chat.{key}": value for key, value in chat.items()}}
    )


def _shown(value: Any) -> str:
    """A value for a message of one line; a template by its hash."""
    if isinstance(value, str) and "\n" in value:
        return f"a text of sha256 {hashlib.sha256(value.encode()).hexdigest()[:12]}"
    return shown(value)


def tasks_dir(output_dir: Path) -> Path:
    """Where the records are until the index is written."""
    return output_dir / "tasks"


def _record_file(output_dir: Path, task: int) -> Path:
    return tasks_dir(output_dir) / f"task_{task:05d}.json"


def task_lock_file(output_dir: Path, task: int) -> Path:
    """Who has this lock works on the task."""
    return tasks_dir(output_dir) / f"task_{task:05d}.lock"


@contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Has a directory of token shards to itself, as long as something is to be done there; who comes second waits."""
    lock_file = output_dir / "preparation.lock"
    is_complete = (output_dir / INDEX_FILE).is_file() and not tasks_dir(output_dir).exists()
    if is_complete and not os.path.lexists(lock_file):
        yield
        return
    make_directory(output_dir)
    with locked(lock_file, waits=True):
        yield


def recorded(plan: Plan, sources: Sources, task: int) -> TaskRecord | None:
    """What a finished task made, or None where it is not finished or was another preparation's."""
    return _read(plan, task, sources.plan)


def _read(plan: Plan, task: int, sources: str) -> TaskRecord | None:
    try:
        content = read_json(_record_file(plan.output_dir, task), _RecordContent)
    except DamagedError:
        return None
    record = content["record"]
    if content["sha256"] != _sha256(record):  # a bit has flipped, and would be in the index for ever
        return None
    return record if (record["made_of"], record["plan"]) == (plan.made_of, sources) else None


def record_task(plan: Plan, task: int, record: TaskRecord) -> None:
    """Records a finished task, whose shards are on the disk."""
    content = _RecordContent(record=record, sha256=_sha256(record))
    write_file(_record_file(plan.output_dir, task), json.dumps(content).encode())


def _sha256(record: TaskRecord) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


class _RecordContent(TypedDict):
    record: TaskRecord
    sha256: str


class _MadeBy(TypedDict):
    tokenizer_fingerprint: str


class _MadeOf(TypedDict):
    made_of: _MadeBy


class _AnyRecordContent(TypedDict):
    record: _MadeOf


def forget_other_preparations(plan: Plan) -> None:
    """A preparation that was changed half-way must not be finished with the shards of before.

    Raises:
        UserError: where it was the tokenizer that changed, which nobody asks for and every part would be lost by.
    """
    for file in sorted(tasks_dir(plan.output_dir).glob("task_*.json")):
        try:
            found = read_json(file, _AnyRecordContent)["record"]["made_of"]
        except DamagedError:  # another task has just forgotten it; or it counts for nothing and is written again
            continue
        before, now = found["tokenizer_fingerprint"], plan.fingerprint
        if before != now:
            raise UserError(
                f"'{plan.output_dir}' holds parts made with another tokenizer ({before[:8]}, now {now[:8]}); restore "
                f"the tokenizer, or delete that directory."
            )
        if found != plan.made_of:
            file.unlink(missing_ok=True)
