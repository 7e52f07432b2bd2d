"""Preparation: text to token shards.

A preparation is a number of independent tasks, each of which reads every num_tasks-th document, and a last step that
writes the index. A finished task is not run again; one that was killed is, to the same bytes. So processes, cluster
arrays and a loop run the same function.
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from gpt2x.config import CorpusSection, PreparationRecipe, TokenizerSection
from gpt2x.errors import UserError
from gpt2x.shards.corpus import Document, documents, is_validation
from gpt2x.shards.files import write_durably
from gpt2x.shards.index import INDEX_FILE, SPLITS, Index, ShardEntry, load_index, write_index
from gpt2x.shards.tokenizer import (
    is_saved,
    load_tokenizer,
    save_tokenizer,
    text_encoder,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from gpt2x.shards.writer import ShardWriter

# What is given to the tokenizer at once: enough for its threads, little beside a shard.
CHARACTERS_PER_BATCH = 4_000_000


def prepare(recipe: PreparationRecipe, *, num_tasks: int = 1) -> Index:
    """Makes the token shards of a recipe: the tokenizer where it is to be trained, every task, the index.

    What is finished is left alone.

    Raises:
        UserError: what the steps raise.
    """
    prepare_tokenizer(recipe.tokenizer, recipe.corpus)
    for task in range(num_tasks):
        prepare_task(recipe, task, num_tasks=num_tasks)
    return finalize(recipe, num_tasks=num_tasks)


def prepare_tokenizer(section: TokenizerSection, corpus: CorpusSection) -> PreTrainedTokenizerFast:
    """Loads the tokenizer, after training it on the corpus' training documents where vocab_size asks for that.

    Raises:
        UserError: where the saved one has another vocabulary size; and what training and loading raise.
    """
    if section.vocab_size is not None and not is_saved(section.path):
        texts = (text for _, text in documents(corpus) if not is_validation(text, corpus))
        progress = tqdm(texts, desc="training the tokenizer", unit=" documents", disable=None)
        save_tokenizer(train_tokenizer(progress, section), Path(section.path))
    tokenizer = load_tokenizer(section.path)
    if section.vocab_size not in (None, vocabulary_size(tokenizer)):
        raise UserError(
            f"tokenizer.vocab_size is {section.vocab_size}, but the tokenizer saved in '{section.path}' has "
            f"{vocabulary_size(tokenizer)}; set another tokenizer.path, or delete that directory."
        )
    return tokenizer


def prepare_task(recipe: PreparationRecipe, task: int, *, num_tasks: int = 1) -> None:
    """Tokenizes the documents task, task + num_tasks, ... of the corpus into shards and records them.

    The shards of task t are numbered t, t + num_tasks, ..., so tasks need not know of each other. A shard ends before
    the document that would make it longer than tokens_per_shard. Memory: one shard and the longest document.

    Raises:
        UserError: for a corpus or tokenizer that cannot be read, and an output_dir with data of another recipe.
    """
    tokenizer = load_tokenizer(recipe.tokenizer.path)
    made_of = {**_made_of(recipe, tokenizer), "num_tasks": num_tasks}
    if _finished(recipe, tokenizer) or _recorded(recipe.output_dir, task, made_of):
        return
    _forget_other_preparations(recipe.output_dir, made_of)
    dropped: Counter[str] = Counter()
    writers = {split: ShardWriter(recipe, tokenizer, split, count(task, num_tasks)) for split in SPLITS}
    chosen = islice(documents(recipe.corpus, dropped=dropped), task, None, num_tasks)
    progress = tqdm(chosen, desc=f"tokenizing (task {task + 1} of {num_tasks})", unit=" documents", disable=None)
    for document, ids in _tokenized(progress, tokenizer):
        split = "validation" if is_validation(document.text, recipe.corpus) else "train"
        writers[split].add(document, ids)
    splits = {split: [dataclasses.asdict(entry) for entry in writer.close()] for split, writer in writers.items()}
    record = {"made_of": made_of, "splits": splits, "dropped": dict(dropped)}
    write_durably(_record_file(recipe.output_dir, task), [json.dumps(record).encode()])


def finalize(recipe: PreparationRecipe, *, num_tasks: int = 1) -> Index:
    """Collects the tasks' records into the index.

    Raises:
        UserError: where a task is not finished, where a split that should have documents has none, and for an
            output_dir with data of another recipe.
    """
    tokenizer = load_tokenizer(recipe.tokenizer.path)
    if finished := _finished(recipe, tokenizer):
        return finished
    made_of = _made_of(recipe, tokenizer)
    records = [_recorded(recipe.output_dir, task, {**made_of, "num_tasks": num_tasks}) for task in range(num_tasks)]
    missing = [task for task, record in enumerate(records) if record is None]
    if missing:
        raise UserError(f"tasks {missing} of {num_tasks} are not finished in '{recipe.output_dir}'; run them first.")
    splits = {split: _in_order(ShardEntry(**e) for r in records if r for e in r["splits"][split]) for split in SPLITS}
    _check_split(recipe, {split: sum(entry.num_documents for entry in splits[split]) for split in SPLITS})
    assert records[0] is not None
    index = Index(
        directory=recipe.output_dir,
        splits=splits,
        tokenizer_fingerprint=made_of["tokenizer_fingerprint"],
        vocab_size=vocabulary_size(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        recipe=made_of,
        dropped=records[0]["dropped"],
    )
    if Path(recipe.tokenizer.path).resolve() != index.tokenizer_dir.resolve():
        save_tokenizer(tokenizer, index.tokenizer_dir)
    _remove_unlisted_shards(index)
    write_index(index)
    shutil.rmtree(recipe.output_dir / "tasks")
    return index


def statistics(index: Index) -> str:
    """What a directory of token shards holds, a line per split and one for what was left out."""
    lines = []
    for split in SPLITS:
        tokens, num_bytes = index.total(split, "num_tokens"), index.total(split, "num_bytes")
        lines.append(
            f"{split}: {index.total(split, 'num_documents'):,} documents, {num_bytes:,} bytes, {tokens:,} tokens "
            f"in {len(index.splits[split])} shards, {num_bytes / max(tokens, 1):.3f} bytes per token"
        )
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(index.dropped.items())) or "nothing"
    return "\n".join([*lines, f"left out: {dropped}"])


def _tokenized(
    chosen: Iterable[Document], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Document, np.ndarray]]:
    encoder = text_encoder(tokenizer)
    for batch in _batches(chosen):
        encodings = encoder.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            yield document, np.array(encoding.ids, np.int64)


def _batches(chosen: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in chosen:
        batch.append(document)
        size += len(document.text)
        if size >= CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _made_of(recipe: PreparationRecipe, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What determines the shards, as JSON gives it back."""
    return {
        **dataclasses.asdict(recipe.corpus),
        "tokens_per_shard": recipe.tokens_per_shard,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }


def _finished(recipe: PreparationRecipe, tokenizer: PreTrainedTokenizerFast) -> Index | None:
    """The finished data in output_dir, if there is any; it must be this recipe's."""
    if not (recipe.output_dir / INDEX_FILE).is_file():
        return None
    index, wanted = load_index(recipe.output_dir), _made_of(recipe, tokenizer)
    found = index.recipe
    changed = [f"{key} {found.get(key)!r} -> {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if changed:
        raise UserError(
            f"'{recipe.output_dir}' holds data of another recipe ({', '.join(changed)}); "
            f"set another output_dir, or delete that directory."
        )
    return index


def _record_file(output_dir: Path, task: int) -> Path:
    return output_dir / "tasks" / f"task_{task:05d}.json"


def _recorded(output_dir: Path, task: int, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished task made, or None where it is not finished or was another preparation's."""
    file = _record_file(output_dir, task)
    record = json.loads(file.read_bytes()) if file.is_file() else {}
    return record if record.get("made_of") == made_of else None


def _forget_other_preparations(output_dir: Path, made_of: dict[str, Any]) -> None:
    """A preparation that was changed half-way must not be finished with the shards of before."""
    (output_dir / "tasks").mkdir(parents=True, exist_ok=True)
    for file in (output_dir / "tasks").glob("task_*.json"):
        if json.loads(file.read_bytes())["made_of"] != made_of:
            file.unlink()


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


def _check_split(recipe: PreparationRecipe, num_documents: dict[str, int]) -> None:
    total, fraction = sum(num_documents.values()), recipe.corpus.validation_fraction
    if total == 0:
        raise UserError(
            f"the corpus ({recipe.corpus.paths or recipe.corpus.kind}) has no document; give it some text."
        )
    for split in SPLITS if fraction else ("train",):
        if num_documents[split] == 0:
            raise UserError(
                f"none of the corpus' {total} documents falls into {split} (validation_fraction {fraction}); split "
                f"the text into more documents, or set another corpus.split_seed or corpus.validation_fraction."
            )
