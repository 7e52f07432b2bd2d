"""What a preparation is: recipe, tokenizer and texts, and whether what lies in its directory was made of them."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from gpt2x.addresses import without_secrets
from gpt2x.config import CorpusSection, PreparationRecipe
from gpt2x.config.checks import shown
from gpt2x.corpus.source_files import dataset_revision, source_files
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
from gpt2x.corpus.values import listed
from gpt2x.errors import UserError
from gpt2x.files import locked, make_directory
from gpt2x.preparation.records import TaskRecord, recorded, tasks_dir
from gpt2x.shards.index import INDEX_FILE, Index, load_index
from gpt2x.shards.writer import Vocabulary
from gpt2x.tokenizers.chat_template import chat_tokenizer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe and its tokenizer, and what both come to."""

    recipe: PreparationRecipe
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    made_of: dict[str, Any]
    """What determines the shards, as JSON gives it back."""

    @property
    def output_dir(self) -> Path:
        """Where the shards go."""
        return self.recipe.output_dir


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
    vocabulary = Vocabulary.of(tokenizer)
    made_of = {
        **without_secrets(dataclasses.asdict(recipe.corpus)),
        "tokens_per_shard": recipe.tokens_per_shard,
        "num_tasks": recipe.num_tasks,
        "tokenizer_fingerprint": vocabulary.fingerprint,
    }
    if recipe.chat is not None:
        # What the template says, not where it lies.
        made_of["chat"] = {**dataclasses.asdict(recipe.chat), "template": tokenizer.chat_template}
    return Plan(recipe=recipe, tokenizer=tokenizer, vocabulary=vocabulary, made_of=made_of)


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
    make_directory(tasks_dir(plan.output_dir))
    with locked(tasks_dir(plan.output_dir) / "plan.lock", waits=True):
        record = read_record(plan.output_dir)
        if (
            record is None
            or record["made_of"] != plan.made_of
            or not (record["files"] == found or any(_finished_tasks(plan, record)))
        ):
            record = record_of(plan, found, revision=dataset_revision(plan.recipe.corpus))
            write_record(plan.output_dir, record)
    known: dict[str, str] = {}
    for task in _finished_tasks(plan, record) if record["files"] != found else ():
        known |= task["sha256"]
    then = [with_sha256(file, known) for file in record["files"]]
    # Where files are dealt out to the tasks, one that no finished task has read is in no shard.
    if changed := changes(then, found, files, is_partly_read=len(files) >= plan.recipe.num_tasks):
        raise UserError(
            f"'{plan.output_dir}' holds parts made of other texts ({listed(changed, most=3)}); restore them, set "
            f"another output_dir, or delete that directory."
        )
    return Sources(files=files, found=found, revision=record.get("revision"), plan=identity_of(record))


def _finished_tasks(plan: Plan, record: SourceRecord) -> Iterator[TaskRecord]:
    identity = identity_of(record)
    records = (recorded(plan.output_dir, task, plan=identity) for task in range(plan.recipe.num_tasks))
    return (one for one in records if one is not None)


def record_of(plan: Plan, files: list[SourceFile], *, revision: str | None) -> SourceRecord:
    """What is recorded of a preparation's sources."""
    return SourceRecord(made_of=plan.made_of, tokenizer=plan.recipe.tokenizer.path, files=files, revision=revision)


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
