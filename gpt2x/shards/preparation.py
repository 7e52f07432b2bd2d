"""Preparation: text to token shards.

A preparation is a number of independent tasks, each of which reads its share of the corpus, and a last step that
writes the index. A finished task is not run again; one that was killed is, to the same bytes. So processes, cluster
arrays and a loop run the same function.
"""

import dataclasses
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from gpt2x.config import CorpusSection, PreparationRecipe, TokenizerSection
from gpt2x.errors import UserError
from gpt2x.shards.chats import read_chats, spoken_text, write_chats
from gpt2x.shards.corpus import Piece, Reading, Share, open_corpus, read_pieces, size_to_read
from gpt2x.shards.cutting import can_be_cut, without_runs
from gpt2x.shards.encoding import encoded
from gpt2x.shards.index import SPLITS, Index, ShardEntry, write_index
from gpt2x.shards.paths import passed_over
from gpt2x.shards.progress import ProgressBar, Report
from gpt2x.shards.records import (
    Plan,
    finished_index,
    forget_other_preparations,
    plan_of,
    recorded,
    tasks_dir,
    write_record,
)
from gpt2x.shards.tokenizer import (
    is_saved,
    load_tokenizer,
    save_tokenizer,
    text_encoder,
    train_tokenizer,
    vocabulary_size,
)
from gpt2x.shards.workers import run_parts, usable_cores
from gpt2x.shards.writer import ShardWriter


def prepare(recipe: PreparationRecipe) -> Index:
    """Makes the token shards of a recipe: the tokenizer where it is to be trained, every task, the index.

    What is finished is left alone. The shards do not depend on the number of workers.

    Raises:
        UserError: what the steps raise.
    """
    as_chat = recipe.chat is not None
    plan = plan_of(recipe, prepare_tokenizer(recipe.tokenizer, recipe.corpus, as_chat=as_chat))
    if finished := finished_index(plan):
        shutil.rmtree(tasks_dir(recipe.output_dir), ignore_errors=True)
        return finished
    if recipe.corpus.kind == "files" and (others := passed_over(recipe.corpus.paths)):
        print(others, file=sys.stderr)
    missing = [task for task in range(recipe.num_tasks) if not recorded(plan, task)]
    num_workers = min(recipe.num_workers or usable_cores(), len(missing))
    with _progress(recipe, missing) as progress:
        if num_workers > 1:
            run_parts(_work, recipe, missing, num_workers=num_workers, report=progress.report)
        else:
            for task in missing:
                _run_task(plan, task, progress.report)
    return _finalize(plan)


def _progress(recipe: PreparationRecipe, tasks: list[int]) -> ProgressBar:
    if not tasks:
        return ProgressBar("tokenizing", total=0, unit="B")
    as_chat = recipe.chat is not None
    size, unit = size_to_read(recipe.corpus, tasks, num_tasks=recipe.num_tasks, as_chat=as_chat)
    return ProgressBar("tokenizing", total=size, unit=unit)


def _work(recipe: PreparationRecipe, task: int, report: Report) -> None:
    prepare_task(recipe, task, report=report)


def prepare_tokenizer(
    section: TokenizerSection, corpus: CorpusSection, *, as_chat: bool = False
) -> PreTrainedTokenizerFast:
    """Loads the tokenizer, after training it on the corpus' training documents where vocab_size asks for that.

    Args:
        section: where it is, and whether it is trained.
        corpus: what it is trained on.
        as_chat: whether the corpus' rows are conversations; then it is trained on what is said in them.

    Raises:
        UserError: where the saved one has another vocabulary size; and what training and loading raise.
    """
    if section.vocab_size is not None and not is_saved(section.path):
        reading = open_corpus(corpus, lambda read: progress.report(read, 0), as_chat=as_chat)
        with ProgressBar("training the tokenizer", total=reading.size, unit=reading.unit) as progress:
            texts = _training_texts(reading, corpus, as_chat=as_chat)
            save_tokenizer(train_tokenizer(texts, section), Path(section.path))
    tokenizer = load_tokenizer(section.path)
    if section.vocab_size not in (None, vocabulary_size(tokenizer)):
        raise UserError(
            f"tokenizer.vocab_size is {section.vocab_size}, but the tokenizer saved in '{section.path}' has "
            f"{vocabulary_size(tokenizer)}; set another tokenizer.path, or delete that directory."
        )
    return tokenizer


def _training_texts(reading: Reading, corpus: CorpusSection, *, as_chat: bool) -> Iterator[str]:
    if as_chat:
        chats = read_chats(reading, corpus, dropped=Counter())
        return (spoken_text(chat) for chat in chats if not chat.is_validation)
    pieces = read_pieces(reading, corpus, dropped=Counter(), cuts=True)
    return (without_runs(piece.text) for piece in pieces if not piece.is_validation)


def prepare_task(recipe: PreparationRecipe, task: int, *, report: Report | None = None) -> None:
    """Tokenizes a task's share of the corpus into shards and records them; does nothing where that is done.

    The shards of task t are numbered t, t + num_tasks, ..., so tasks need not know of each other. A shard ends before
    the document that would make it longer than tokens_per_shard. Memory: some batches of text and their encodings.

    Args:
        recipe: names the number of tasks.
        task: below it.
        report: told how far the task is.

    Raises:
        UserError: for a corpus or tokenizer that cannot be read, and an output_dir with data of another recipe.
    """
    if not 0 <= task < recipe.num_tasks:
        raise UserError(f"task ({task}) must be at least 0 and below num_tasks ({recipe.num_tasks}).")
    plan = plan_of(recipe, load_tokenizer(recipe.tokenizer.path))
    if not finished_index(plan) and not recorded(plan, task):
        _run_task(plan, task, report or (lambda *_: None))


def _run_task(plan: Plan, task: int, report: Report) -> None:
    forget_other_preparations(plan)
    with ExitStack() as stack:
        numbers = {split: count(task, plan.recipe.num_tasks) for split in SPLITS}
        writers = {split: stack.enter_context(ShardWriter(plan, split, numbers[split])) for split in SPLITS}
        dropped = _tokenize(plan, task, writers, report)
        splits = {split: [dataclasses.asdict(entry) for entry in writers[split].finish()] for split in SPLITS}
    write_record(plan, task, {"splits": splits, "dropped": dict(dropped)})


def _tokenize(plan: Plan, task: int, writers: dict[str, ShardWriter], report: Report) -> Counter[str]:
    """Reads, encodes and writes a task's documents; returns how many were left out, by reason."""
    dropped: Counter[str] = Counter()
    unreported = 0

    def advance(read: int) -> None:
        nonlocal unreported
        unreported += read

    share, as_chat = Share(task=task, num_tasks=plan.recipe.num_tasks), plan.recipe.chat is not None
    reading = open_corpus(plan.recipe.corpus, advance, share=share, as_chat=as_chat)
    write = write_chats if as_chat else _write_documents
    for num_tokens in write(plan, reading, writers, dropped=dropped):
        report(unreported, num_tokens)
        unreported = 0
    report(unreported, 0)
    return dropped


def _write_documents(
    plan: Plan, reading: Reading, writers: dict[str, ShardWriter], *, dropped: Counter[str]
) -> Iterator[int]:
    """Encodes and writes documents; tells after each batch how many tokens it came to."""
    encoder = text_encoder(plan.tokenizer)
    pieces = read_pieces(reading, plan.recipe.corpus, dropped=dropped, cuts=can_be_cut(encoder))
    for batch, encodings in encoded(pieces, encoder):
        yield sum(_write(piece, encoding, writers) for piece, encoding in zip(batch, encodings, strict=True))


def _write(piece: Piece, encoding: Encoding, writers: dict[str, ShardWriter]) -> int:
    writer = writers["validation" if piece.is_validation else "train"]
    ids = np.array(encoding.ids, np.uint32)
    writer.add(piece.name, ids, len(piece.text.encode()))
    if piece.is_last:
        writer.end_document()
    return ids.size + piece.is_last


def finalize(recipe: PreparationRecipe) -> Index:
    """Collects the tasks' records into the index.

    Raises:
        UserError: where a task is not finished, where a split that should have documents has none, and for an
            output_dir with data of another recipe.
    """
    plan = plan_of(recipe, load_tokenizer(recipe.tokenizer.path))
    return finished_index(plan) or _finalize(plan)


def _finalize(plan: Plan) -> Index:
    records = _all_records(plan)
    splits = {split: _in_order(ShardEntry(**e) for r in records for e in r["splits"][split]) for split in SPLITS}
    dropped = dict(sum((Counter(record["dropped"]) for record in records), Counter()))
    _check_split(
        plan.recipe, {split: sum(entry.num_documents for entry in splits[split]) for split in SPLITS}, dropped
    )
    index = Index(
        directory=plan.output_dir,
        splits=splits,
        tokenizer_fingerprint=plan.fingerprint,
        vocab_size=plan.vocab_size,
        eos_token_id=plan.tokenizer.eos_token_id,
        recipe=plan.made_of,
        dropped=dropped,
    )
    if Path(plan.recipe.tokenizer.path).resolve() != index.tokenizer_dir.resolve():
        save_tokenizer(plan.tokenizer, index.tokenizer_dir)
    _remove_unlisted_shards(index)
    write_index(index)
    shutil.rmtree(tasks_dir(plan.output_dir))
    return index


def _all_records(plan: Plan) -> list[dict[str, Any]]:
    num_tasks = plan.recipe.num_tasks
    found = {task: recorded(plan, task) for task in range(num_tasks)}
    missing = [task for task, record in found.items() if record is None]
    if missing:
        raise UserError(f"tasks {missing} of {num_tasks} are not finished in '{plan.output_dir}'; run them first.")
    return [record for record in found.values() if record is not None]


def _remove_unlisted_shards(index: Index) -> None:
    """What preparations that never came to an end have left."""
    for split in SPLITS:
        listed = {entry.file for entry in index.splits[split]}
        for file in (index.directory / split).glob("tokens_part_*.safetensors*"):
            if file.name not in listed:
                file.unlink()


def _in_order(entries: Iterable[ShardEntry]) -> tuple[ShardEntry, ...]:
    """By number, which is no longer the order of the names once a number has six digits."""
    return tuple(sorted(entries, key=lambda entry: (len(entry.file), entry.file)))


def _check_split(recipe: PreparationRecipe, num_documents: dict[str, int], dropped: dict[str, int]) -> None:
    total, fraction = sum(num_documents.values()), recipe.corpus.validation_fraction
    if total == 0:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        what = f" but what is left out ({left_out}); correct corpus.text_column, or" if left_out else ";"
        raise UserError(
            f"the corpus ({recipe.corpus.paths or recipe.corpus.dataset or recipe.corpus.kind}) has no document{what} "
            f"give it some text."
        )
    for split in SPLITS if fraction else ("train",):
        if num_documents[split] == 0:
            raise UserError(
                f"none of the corpus' {total} documents falls into {split} (validation_fraction {fraction}); split "
                f"the text into more documents, or set another corpus.split_seed or corpus.validation_fraction."
            )
