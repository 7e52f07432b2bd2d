"""Token files of any project to token shards, document by document."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from gpt2x.config import ImportRecipe
from gpt2x.corpus.sources import date_of
from gpt2x.errors import UserError
from gpt2x.files import discard, make_directory
from gpt2x.locate import local_path
from gpt2x.preparation.plan import alone_in
from gpt2x.shards.files import Shard, token_dtype, write_shard
from gpt2x.shards.foreign.byte_counts import byte_counter
from gpt2x.shards.index import INDEX_FILE, SPLITS, Index, ShardEntry, load_index, split_directory, write_index
from gpt2x.shards.token_sets import TokenSet, open_tokens
from gpt2x.tokenizers.bpe import load_tokenizer, save_tokenizer, tokenizer_fingerprint, vocabulary_size


def import_tokens(recipe: ImportRecipe) -> Index:
    """Rewrites token files as token shards; what was killed begins again.

    What is finished is left alone, which one line says. Of two processes that import into a directory, the second
    waits.

    The tokens stay the same, but for an end of text after a last document that lacks one. Memory: one shard of each
    split and the longest document, which is everything in files without an end of text.

    Raises:
        UserError: for files that cannot be read, an output_dir with other data, and a split that gets no document.
    """
    source = open_tokens(recipe.path, validation_path=recipe.validation_path, tokenizer=recipe.tokenizer)
    made_of = _made_of(recipe, source)
    with alone_in(recipe.output_dir):
        return _finished(recipe, made_of) or _import(recipe, source, made_of)


def _import(recipe: ImportRecipe, source: TokenSet, made_of: dict[str, Any]) -> Index:
    tokenizer = load_tokenizer(recipe.tokenizer)
    writers = {split: _SplitWriter(recipe, tokenizer, split) for split in SPLITS}
    for split, ids in _assigned_documents(recipe, source):
        writers[split].add(ids)
    splits = {split: writer.close() for split, writer in writers.items()}
    _check_splits(recipe, splits)
    index = Index(
        directory=recipe.output_dir,
        splits=splits,
        tokenizer_fingerprint=made_of["tokenizer_fingerprint"],
        vocab_size=vocabulary_size(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        recipe=made_of,
    )
    if local_path(recipe.tokenizer).resolve() != index.tokenizer_dir.resolve():
        save_tokenizer(tokenizer, index.tokenizer_dir, replaces=True)
    write_index(index)
    return index


class _SplitWriter:
    """Collects a split's documents, as views of where they lie, and writes a shard when one is full."""

    def __init__(self, recipe: ImportRecipe, tokenizer: PreTrainedTokenizerFast, split: str) -> None:
        self.directory, self.tokens_per_shard = split_directory(recipe.output_dir, split), recipe.tokens_per_shard
        self.vocab_size, self.eos_token_id = vocabulary_size(tokenizer), tokenizer.eos_token_id
        self.metadata = {
            "format": "gpt2x.tokens.1",
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": str(self.vocab_size),
            "eos_token_id": str(self.eos_token_id),
        }
        self.count_bytes: Callable[[Shard], int] = byte_counter(tokenizer)
        self.documents: list[np.ndarray] = []
        self.num_tokens, self.entries = 0, list[ShardEntry]()
        make_directory(self.directory)
        for file in self.directory.glob("tokens_part_*.safetensors*"):  # of an import that was killed
            discard(file)

    def add(self, ids: np.ndarray) -> None:
        """Takes a document, its end of text included."""
        if self.documents and self.num_tokens + ids.size > self.tokens_per_shard:
            self._write()
        self.documents.append(ids)
        self.num_tokens += ids.size

    def close(self) -> tuple[ShardEntry, ...]:
        """Writes what is left and returns the entries of all shards."""
        if self.documents:
            self._write()
        return tuple(self.entries)

    def _write(self) -> None:
        shard = Shard(
            file=self.directory / f"tokens_part_{len(self.entries):05d}.safetensors",
            tokens=np.concatenate(self.documents, dtype=token_dtype(self.vocab_size), casting="unsafe"),
            bounds=np.cumsum([0, *(ids.size for ids in self.documents)], dtype=np.int64),
            eos_token_id=self.eos_token_id,
        )
        sha256 = write_shard(shard.file, tokens=shard.tokens, documents=shard.documents, metadata=self.metadata)
        entry = ShardEntry(
            file=shard.file.name,
            num_tokens=self.num_tokens,
            num_documents=len(self.documents),
            num_bytes=self.count_bytes(shard),
            sha256=sha256,
        )
        self.entries.append(entry)
        self.documents, self.num_tokens = [], 0


def _assigned_documents(recipe: ImportRecipe, source: TokenSet) -> Iterator[tuple[str, np.ndarray]]:
    """Every document with the split that it goes to: its own, or the one its hash says where nothing is held out."""
    is_split = source.has_split("validation")
    for split in SPLITS if is_split else ("train",):
        shards = tqdm(source.open_split(split), desc=f"importing {split}", unit=" files", disable=None)
        for ids in _documents(shards, source.eos_token_id):
            held_out = not is_split and _is_validation(ids[:-1], recipe)
            yield ("validation" if held_out else split), ids


def _documents(shards: Iterable[Shard], eos_token_id: int) -> Iterator[np.ndarray]:
    """The documents of files one after the other, each with its end of text.

    Where a file does not list its documents, one without its end goes on in the next file, as in those of llm.c.
    """
    beginning: list[np.ndarray] = []
    end_of_text = np.array([eos_token_id])
    for shard in shards:
        for start, end in zip(shard.documents[:-1], shard.documents[1:]):
            ids = shard.tokens[start:end]
            if ids[-1] != eos_token_id and shard.bounds is None:
                beginning.append(ids)
                continue
            parts = [*beginning, ids] if ids[-1] == eos_token_id else [ids, end_of_text]
            yield parts[0] if len(parts) == 1 else np.concatenate(parts)
            beginning = []
    if beginning:
        yield np.concatenate([*beginning, end_of_text])


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
