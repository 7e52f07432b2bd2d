"""Preparation: text to token shards.

A preparation is a number of independent tasks, each of which reads its share of the corpus, and a last step that
writes the index. A finished task is not run again; one that was killed is, to the same bytes. So processes, cluster
arrays and a loop run the same function.
"""

import dataclasses
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress

from transformers import PreTrainedTokenizerFast

from gpt2x.config import CorpusSection, PreparationRecipe, TokenizerSection
from gpt2x.corpus.cutting import without_runs
from gpt2x.corpus.documents import Reading, open_corpus, read_pieces, size_to_read
from gpt2x.corpus.paths import passed_over
from gpt2x.corpus.sources import read_record, with_sha256, write_record
from gpt2x.corpus.values import listed
from gpt2x.distributed.launch import usable_cores
from gpt2x.errors import UserError
from gpt2x.files import UnwritableError, discard, locked, make_directory, remove_leftovers
from gpt2x.locate import holds_tokenizer, local_path, place_to_write, say
from gpt2x.preparation.chats import read_chats, spoken_text
from gpt2x.preparation.plan import (
    Plan,
    Sources,
    describe_finished,
    finished_index,
    plan_of,
    planned_sources,
    record_of,
)
from gpt2x.preparation.records import alone_in, recorded, tasks_dir
from gpt2x.preparation.tasks import prepare_task, run_task
from gpt2x.preparation.workers import progress_bar, run_parts
from gpt2x.scan import cache_dir
from gpt2x.shards.index import INDEX_FILE, SPLITS, Index, ShardEntry, entry_of, split_directory, write_index
from gpt2x.tokenizers.bpe import (
    check_trained_on,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    training_of,
    vocabulary_size,
)


def prepare(recipe: PreparationRecipe, *, is_quiet: bool = False) -> Index:
    """Makes the token shards of a recipe: the tokenizer where it is to be trained, every task, the index.

    What is finished is left alone, which one line says. The shards do not depend on the number of workers. Of two
    processes that prepare the same, the second waits, and then finds it done.

    Args:
        recipe: what to prepare.
        is_quiet: whether nothing is said of what is finished.

    Raises:
        OtherDataError: for an output_dir with data of another recipe, or of texts that have changed since.
        UserError: what the steps raise.
    """
    plan = plan_of(recipe, _tokenizer_of(recipe))
    with alone_in(recipe.output_dir):
        if finished := finished_index(plan):
            if not is_quiet:
                print(describe_finished(finished, recipe.corpus), flush=True)
            discard(tasks_dir(recipe.output_dir))
            return finished
        check_trained_on(recipe.tokenizer, recipe.corpus, as_chat=recipe.chat is not None)
        sources = planned_sources(plan)
        if recipe.corpus.kind == "files" and (others := passed_over(recipe.corpus.paths)):
            print(others, file=sys.stderr)
        _run_missing_tasks(plan, sources)
        return _finalize(plan)


def _run_missing_tasks(plan: Plan, sources: Sources) -> None:
    recipe, as_chat = plan.recipe, plan.recipe.chat is not None
    missing = [task for task in range(recipe.num_tasks) if not recorded(plan.output_dir, task, plan=sources.plan)]
    if not missing:
        return
    num_workers = min(recipe.num_workers or usable_cores(), len(missing))
    size, unit = size_to_read(recipe.corpus, missing, num_tasks=recipe.num_tasks, files=sources.files, as_chat=as_chat)
    with progress_bar("tokenizing", total=size, unit=unit) as report:
        if num_workers > 1:
            # The tokenizer lies on this machine by now: no worker asks the Hub for it.
            tokenizer = dataclasses.replace(recipe.tokenizer, path=plan.tokenizer.name_or_path)
            recipe = dataclasses.replace(recipe, tokenizer=tokenizer)
            run_parts(prepare_task, recipe, missing, num_workers=num_workers, report=report)
        else:
            for task in missing:
                run_task(plan, task, report)


def _tokenizer_of(recipe: PreparationRecipe) -> PreTrainedTokenizerFast:
    """The recipe's; for finished shards their own copy, where the recipe's is not on this machine and nothing says
    that it is another one."""
    section, own = recipe.tokenizer, recipe.output_dir / "tokenizer"
    record = read_record(recipe.output_dir)
    is_another = record is not None and record["tokenizer"] != section.path
    has_own = (recipe.output_dir / INDEX_FILE).is_file() and holds_tokenizer(own)
    if has_own and not (holds_tokenizer(local_path(section.path)) or is_another):
        section = dataclasses.replace(section, path=str(own))
    return prepare_tokenizer(section, recipe.corpus, as_chat=recipe.chat is not None)


def prepare_tokenizer(
    section: TokenizerSection, corpus: CorpusSection, *, as_chat: bool = False
) -> PreTrainedTokenizerFast:
    """Loads the tokenizer, after training it on the corpus' training documents where vocab_size asks for that.

    Args:
        section: where it is, and whether it is trained; by one process at a time.
        corpus: what it is trained on.
        as_chat: whether the corpus' rows are conversations; then it is trained on what is said in them.

    Raises:
        UserError: where the saved one has another vocabulary size; and what training and loading raise.
    """
    if section.vocab_size is not None and not holds_tokenizer(local_path(section.path)):
        _train_tokenizer(section, corpus, as_chat=as_chat)
    tokenizer = load_tokenizer(section.path)
    if section.vocab_size not in (None, vocabulary_size(tokenizer)):
        raise UserError(
            f"tokenizer.vocab_size is {section.vocab_size}, but the tokenizer saved in '{section.path}' has "
            f"{vocabulary_size(tokenizer)}; set another tokenizer.path, or delete that directory."
        )
    return tokenizer


def _train_tokenizer(section: TokenizerSection, corpus: CorpusSection, *, as_chat: bool) -> None:
    """Trains and saves it, unless another process just has."""
    key = hashlib.sha256(str(local_path(section.path).resolve()).encode()).hexdigest()[:32]
    with ExitStack() as stack:
        with suppress(UnwritableError):  # then two would train the same, and one would complain
            make_directory(cache_dir())
            stack.enter_context(locked(cache_dir() / f"tokenizer-{key}.lock", waits=True))
        if holds_tokenizer(local_path(section.path)):
            return
        directory = place_to_write(section.path, field="tokenizer.path")
        reading = open_corpus(corpus, lambda read: report(read, 0), as_chat=as_chat)
        say(f"training a tokenizer of {section.vocab_size:,} tokens into {directory}")
        with progress_bar("training the tokenizer", total=reading.size, unit=reading.unit) as report:
            texts = _training_texts(reading, corpus, as_chat=as_chat)
            made_of = training_of(section, corpus, as_chat=as_chat)
            save_tokenizer(train_tokenizer(texts, section), directory, trained_on=made_of)


def _training_texts(reading: Reading, corpus: CorpusSection, *, as_chat: bool) -> Iterator[str]:
    if as_chat:
        chats = read_chats(reading, corpus, dropped=Counter())
        return (spoken_text(chat) for chat in chats if not chat.is_validation)
    pieces = read_pieces(reading, corpus, dropped=Counter(), cuts=True)
    return (without_runs(piece.text) for piece in pieces if not piece.is_validation)


def finalize(recipe: PreparationRecipe) -> Index:
    """Collects the tasks' records into the index.

    Raises:
        UserError: where a task is not finished, where a split that should have documents has none, and for an
            output_dir with data of another recipe.
    """
    plan = plan_of(recipe, load_tokenizer(recipe.tokenizer.path))
    with alone_in(recipe.output_dir):
        return finished_index(plan) or _finalize(plan)


def _finalize(plan: Plan) -> Index:
    """Writes what the records come to, the index last: where it is, the rest is on the disk."""
    sources, num_tasks = planned_sources(plan), plan.recipe.num_tasks
    found = {task: recorded(plan.output_dir, task, plan=sources.plan) for task in range(num_tasks)}
    records = [record for record in found.values() if record is not None]
    if len(records) < num_tasks:
        missing = [task for task, record in found.items() if record is None]
        raise UserError(f"tasks {missing} of {num_tasks} are not finished in '{plan.output_dir}'; run them first.")
    splits = {split: _in_order(entry_of(e) for r in records for e in r["splits"][split]) for split in SPLITS}
    dropped = dict(sum((Counter(record["dropped"]) for record in records), Counter()))
    num_documents = {split: sum(entry.num_documents for entry in splits[split]) for split in SPLITS}
    _check_split(plan.recipe, num_documents, dropped)
    sha256 = {name: value for record in records for name, value in record["sha256"].items()}
    files = [with_sha256(file, sha256) for file in sources.found]
    write_record(plan.output_dir, record_of(plan, files, revision=sources.revision))
    index = Index(
        directory=plan.output_dir,
        splits=splits,
        tokenizer_fingerprint=plan.vocabulary.fingerprint,
        vocab_size=plan.vocabulary.size,
        eos_token_id=plan.vocabulary.eos_token_id,
        recipe=plan.made_of,
        dropped=dropped,
    )
    finish(index, plan.tokenizer, path=plan.recipe.tokenizer.path)
    discard(tasks_dir(plan.output_dir))
    return index


def finish(index: Index, tokenizer: PreTrainedTokenizerFast, *, path: str) -> None:
    """The last step of every preparation, an import included: the tokenizer beside the shards, nothing that is not
    listed, and the index last: where it is, the rest is on the disk.

    Args:
        index: of shards that are written.
        tokenizer: that made them.
        path: where the tokenizer is from; what lies in the directory already is left there.
    """
    if local_path(path).resolve() != index.tokenizer_dir.resolve():
        save_tokenizer(tokenizer, index.tokenizer_dir, replaces=True)
    # What preparations that never came to an end have left.
    remove_leftovers(index.directory, "*.json")
    for split in SPLITS:
        listed = {entry.file for entry in index.splits[split]}
        for file in split_directory(index.directory, split).glob("tokens_part_*.safetensors*"):
            if file.name not in listed:
                discard(file)
    write_index(index)


def _in_order(entries: Iterable[ShardEntry]) -> tuple[ShardEntry, ...]:
    """By number, which is no longer the order of the names once a number has six digits."""
    return tuple(sorted(entries, key=lambda entry: (len(entry.file), entry.file)))


def _check_split(recipe: PreparationRecipe, num_documents: dict[str, int], dropped: dict[str, int]) -> None:
    total, fraction = sum(num_documents.values()), recipe.corpus.validation_fraction
    if total == 0:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        what = f" but what is left out ({left_out}); correct corpus.text_column, or" if left_out else ";"
        corpus = listed(recipe.corpus.paths) or recipe.corpus.dataset or recipe.corpus.kind
        raise UserError(f"the corpus ({corpus}) has no document{what} give it some text in UTF-8.")
    for split in SPLITS if fraction else ("train",):
        if num_documents[split] == 0:
            raise UserError(
                f"none of the corpus' {total} documents falls into {split} (validation_fraction {fraction}); split "
                f"the text into more documents, or set another corpus.split_seed or corpus.validation_fraction."
            )
