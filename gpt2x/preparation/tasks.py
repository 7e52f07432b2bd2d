"""A task of a preparation: its share of the corpus to shards, and the record that it is finished."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count

import numpy as np

from gpt2x.config import PreparationRecipe
from gpt2x.corpus.cutting import can_be_cut
from gpt2x.corpus.documents import Reading, Share, open_corpus, read_pieces
from gpt2x.corpus.sources import ReadingWatch
from gpt2x.preparation.chats import write_chats
from gpt2x.preparation.checks import check_task
from gpt2x.preparation.plan import Plan, Sources, finished_index, plan_of, planned_sources
from gpt2x.preparation.records import (
    TaskRecord,
    alone_with_task,
    forget_other_preparations,
    record_task,
    recorded,
)
from gpt2x.preparation.workers import Report
from gpt2x.shards.index import SPLITS, content_of, split_directory
from gpt2x.shards.writer import ShardWriter
from gpt2x.tokenizers.bpe import check_trained_on, load_tokenizer, text_encoder
from gpt2x.tokenizers.encoding import encoded


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
    check_task(task, recipe)
    plan = plan_of(recipe, load_tokenizer(recipe.tokenizer.path))
    if not finished_index(plan):
        check_trained_on(recipe.tokenizer, recipe.corpus, as_chat=recipe.chat is not None)
        run_task(plan, task, report or (lambda *_: None))


def run_task(plan: Plan, task: int, report: Report) -> None:
    """Makes a task's shards, as the only process; what another one has finished in the meantime is left alone."""
    recipe, directory = plan.recipe, plan.output_dir
    with alone_with_task(directory, task):
        if finished_index(plan):
            return
        forget_other_preparations(directory, plan.made_of)
        sources = planned_sources(plan)
        if recorded(directory, task, plan=sources.plan):
            return
        watch = ReadingWatch(sources.files, sources.found, task=task, num_tasks=recipe.num_tasks)
        with ExitStack() as stack:
            writers = {split: stack.enter_context(_writer(plan, task, split)) for split in SPLITS}
            dropped = _tokenize(plan, task, writers, report=report, sources=sources, watch=watch)
            splits = {split: [content_of(entry) for entry in writers[split].finish()] for split in SPLITS}
        record = TaskRecord(
            made_of=plan.made_of, plan=sources.plan, splits=splits, dropped=dict(dropped), sha256=watch.sha256
        )
        record_task(directory, task, record)


def _writer(plan: Plan, task: int, split: str) -> ShardWriter:
    return ShardWriter(
        split_directory(plan.output_dir, split),
        plan.vocabulary,
        tokens_per_shard=plan.recipe.tokens_per_shard,
        numbers=count(task, plan.recipe.num_tasks),
        has_targets=plan.recipe.chat is not None,
    )


def _tokenize(
    plan: Plan, task: int, writers: dict[str, ShardWriter], *, report: Report, sources: Sources, watch: ReadingWatch
) -> Counter[str]:
    """Reads, encodes and writes a task's documents; returns how many were left out, by reason."""
    dropped: Counter[str] = Counter()
    unreported = 0

    def advance(read: int) -> None:
        nonlocal unreported
        unreported += read

    corpus, as_chat = plan.recipe.corpus, plan.recipe.chat is not None
    share = Share(task=task, num_tasks=plan.recipe.num_tasks, revision=sources.revision)
    reading = open_corpus(corpus, advance, share=share, as_chat=as_chat, files=sources.files, read=watch.read)
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
        num_tokens = 0
        for piece, encoding in zip(batch, encodings, strict=True):
            writer = writers["validation" if piece.is_validation else "train"]
            writer.add(piece.name, np.array(encoding.ids, np.uint32), len(piece.text.encode()))
            if piece.is_last:
                writer.end_document()
            num_tokens += len(encoding.ids) + piece.is_last
        yield num_tokens
