"""Token files of any project to token shards, document by document."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt2x.config.importing import ImportRecipe
from gpt2x.corpus.sources import date_of
from gpt2x.errors import UserError
from gpt2x.preparation.prepare import finish
from gpt2x.preparation.records import alone_in
from gpt2x.shards.files import Shard
from gpt2x.shards.foreign.token_set import byte_counter
from gpt2x.shards.index import INDEX_FILE, SPLITS, Index, ShardEntry, load_index, split_directory
from gpt2x.shards.token_sets import TokenSet, open_tokens
from gpt2x.shards.writer import ShardWriter, Vocabulary
from gpt2x.tokenizers.bpe import load_tokenizer


def import_tokens(recipe: ImportRecipe) -> Index:
    """Rewrites token files as token shards; what was killed begins again.

    What is finished is left alone, which one line says. Of two processes that import into a directory, the second
    waits.

    The tokens stay the same, but for an end of text after a last document that lacks one. Memory: the longest
    document, which is everything in files without an end of text.

    Raises:
        UserError: for files that cannot be read, an output_dir with other data, and a split that gets no document.
    """
    source = open_tokens(recipe.path, validation_path=recipe.validation_path, tokenizer=recipe.tokenizer)
    made_of = _made_of(recipe, source)
    with alone_in(recipe.output_dir):
        return _finished(recipe, made_of) or _import(recipe, source, made_of)


def _import(recipe: ImportRecipe, source: TokenSet, made_of: dict[str, Any]) -> Index:
    tokenizer = load_tokenizer(recipe.tokenizer)
    vocabulary, count_bytes, file = Vocabulary.of(tokenizer), byte_counter(tokenizer), Path(recipe.path)
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_writer(recipe, vocabulary, split)) for split in SPLITS}
        for split, ids in _assigned_documents(recipe, source):
            document = Shard(file=file, tokens=ids, bounds=np.array([0, ids.size]))
            writers[split].add(recipe.path, ids, count_bytes(document))
            writers[split].end_document()
        splits = {split: tuple(writer.finish()) for split, writer in writers.items()}
    _check_splits(recipe, splits)
    index = Index(
        directory=recipe.output_dir,
        splits=splits,
        tokenizer_fingerprint=vocabulary.fingerprint,
        vocab_size=vocabulary.size,
        eos_token_id=vocabulary.eos_token_id,
        recipe=made_of,
    )
    finish(index, tokenizer, path=recipe.tokenizer)
    return index


def _writer(recipe: ImportRecipe, vocabulary: Vocabulary, split: str) -> ShardWriter:
    directory = split_directory(recipe.output_dir, split)
    return ShardWriter(directory, vocabulary, tokens_per_shard=recipe.tokens_per_shard, numbers=count())


def _assigned_documents(recipe: ImportRecipe, source: TokenSet) -> Iterator[tuple[str, np.ndarray]]:
    """Every document with the split that it goes to: its own, or the one its hash says where nothing is held out."""
    is_split = source.has_split("validation")
    for split in SPLITS if is_split else ("train",):
        shards = tqdm(source.open_split(split), desc=f"importing {split}", unit=" files", disable=None)
        for ids in _documents(shards, source.eos_token_id):
            held_out = not is_split and _is_validation(ids, recipe)
            yield ("validation" if held_out else split), ids


def _documents(shards: Iterable[Shard], eos_token_id: int) -> Iterator[np.ndarray]:
    """The documents of files one after the other, without their ends of text.

    Where a file does not list its documents, one without its end goes on in the next file, as in those of llm.c.
    """
    parts: list[np.ndarray] = []
    for shard in shards:
        for start, end in zip(shard.documents[:-1], shard.documents[1:]):
            is_ended = shard.tokens[end - 1] == eos_token_id
            parts.append(shard.tokens[start : end - 1 if is_ended else end])
            if is_ended or shard.bounds is not None:
                yield np.concatenate(parts)
                parts = []
    if parts:
        yield np.concatenate(parts)


def _is_validation(ids: np.ndarray, recipe: ImportRecipe) -> bool:
    """Whether a document is held out: a function of its ids and the split's seed, so duplicates stay together."""
    key = str(recipe.split_seed).encode()
    digest = hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8, person=b"gpt2x split", key=key)
    return int.from_bytes(digest.digest(), "little") < recipe.validation_fraction * 2**64


def _made_of(recipe: ImportRecipe, source: TokenSet) -> dict[str, Any]:
    """What determines the shards, as JSON gives it back."""
    fingerprints = {split: source.split_fingerprint(split) for split in SPLITS if source.has_split(split)}
    return {
        "imported": fingerprints,
        "tokenizer_fingerprint": source.tokenizer_fingerprint,
        "tokens_per_shard": recipe.tokens_per_shard,
        "validation_fraction": recipe.validation_fraction,
        "split_seed": recipe.split_seed,
    }


def _finished(recipe: ImportRecipe, made_of: dict[str, Any]) -> Index | None:
    """The finished data in output_dir, if there is any; it must be this recipe's."""
    if not (recipe.output_dir / INDEX_FILE).is_file():
        return None
    index = load_index(recipe.output_dir)
    changed = [key for key in made_of if index.recipe.get(key) != made_of[key]]
    if changed:
        raise UserError(
            f"'{recipe.output_dir}' holds data of another import or preparation (other {', '.join(changed)}); set "
            f"another output_dir, or delete that directory."
        )
    num_tokens = sum(index.total(split, "num_tokens") for split in SPLITS)
    date = date_of(recipe.output_dir / INDEX_FILE)
    print(f"{recipe.output_dir}: already imported on {date} ({num_tokens:,} tokens)", flush=True)
    return index


def _check_splits(recipe: ImportRecipe, splits: dict[str, tuple[ShardEntry, ...]]) -> None:
    num_documents = {split: sum(entry.num_documents for entry in entries) for split, entries in splits.items()}
    for split in SPLITS if recipe.validation_fraction else ("train",):
        if num_documents[split] == 0:
            raise UserError(
                f"none of the {sum(num_documents.values())} documents of '{recipe.path}' falls into {split} "
                f"(validation_fraction {recipe.validation_fraction}); set another validation_fraction or split_seed, "
                f"or name held-out files by validation_path."
            )
