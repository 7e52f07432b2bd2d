"""Arrow and Parquet files with a column of token ids, rewritten once as one memory-mappable run of ids.

Parquet is compressed, and Arrow has a run of ids per record batch, often a thousand rows, with four or eight bytes
per id. A window of tokens is a slice only where the ids stand in one piece; so they are written to a file under
Hugging Face's cache directory, two or four bytes each, which is read ten times as fast as rows are. Memory holds
some rows at a time.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpt2x.errors import UserError
from gpt2x.files import UnwritableError, locked, make_directory, write_file
from gpt2x.scan import cache_dir, identity
from gpt2x.shards.files import token_dtype

COLUMN = "input_ids"
ROWS_PER_BATCH = 1024


def map_parquet(file: Path, vocab_size: int) -> tuple[np.ndarray, Path]:
    """The ids of a Parquet file, and the file under the cache directory that they are mapped from.

    Raises:
        UserError: for a broken file, a missing column, ids that are none, and a cache that cannot be written.
    """
    return _cached(file, vocab_size, _parquet_columns(file))


def map_arrow(file: Path, vocab_size: int) -> tuple[np.ndarray, Path]:
    """The same of an Arrow file, be it of the file format or, as `datasets` writes it, of the stream format."""
    return _cached(file, vocab_size, _arrow_columns(file))


def _parquet_columns(file: Path) -> Iterator[pa.Array]:
    with _complaining(file), pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as parquet:
        _check_schema(file, parquet.schema_arrow)
        for batch in parquet.iter_batches(ROWS_PER_BATCH, columns=[COLUMN]):
            yield batch.column(0)


def _arrow_columns(file: Path) -> Iterator[pa.Array]:
    with _complaining(file), pa.memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(source)
        _check_schema(file, reader.schema)
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                yield batch.column(COLUMN).slice(start, ROWS_PER_BATCH)


@contextmanager
def _complaining(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{file}: pyarrow cannot read it ({first_line(error)}); copy or save it again.") from None


def first_line(error: Exception) -> str:
    """What a library says, as far as it fits into a message."""
    return str(error).strip().split("\n")[0]


def _check_schema(file: Path, schema: pa.Schema) -> None:
    if COLUMN not in schema.names:
        raise UserError(
            f"{file} has no column {COLUMN!r} but {', '.join(schema.names)}; rename the column of token ids, or "
            f"prepare text by scripts/prepare_data.py."
        )
    kind = schema.field(COLUMN).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise UserError(f"{file}: {COLUMN} must hold lists of integers, not {kind}; save the token ids as that.")


def _cached(file: Path, vocab_size: int, columns: Iterator[pa.Array]) -> tuple[np.ndarray, Path]:
    dtype = token_dtype(vocab_size)
    # The vocabulary is part of the key, since the ids are checked against it on their way.
    of = json.dumps({**identity(file), "dtype": dtype.str, "vocab_size": vocab_size}, sort_keys=True)
    cached = cache_dir() / f"tokens-{hashlib.sha256(of.encode()).hexdigest()[:32]}.bin"
    if not _is_whole(cached, dtype):
        try:
            make_directory(cached.parent)
            with locked(cached.with_suffix(".lock"), waits=True):
                if not _is_whole(cached, dtype):
                    write_file(cached, _checked_ids(file, columns, vocab_size))
        except UnwritableError as error:
            raise UserError(
                f"{file} is not mappable, and its ids cannot be written to '{cached.parent}' ({error.reason}); let "
                f"HF_HOME name a directory with room for them, or make shards by scripts/import_tokens.py elsewhere."
            ) from None
    return np.asarray(np.memmap(cached, dtype, mode="r")), cached


def _is_whole(cached: Path, dtype: np.dtype) -> bool:
    """As far as its size tells; what it holds is compared when it is scanned."""
    return cached.is_file() and cached.stat().st_size > 0 and cached.stat().st_size % dtype.itemsize == 0


def _checked_ids(file: Path, columns: Iterator[pa.Array], vocab_size: int) -> Iterator[memoryview]:
    """The ids in the dtype of the vocabulary, as bytes; what does not fit must not be wrapped to what does."""
    position = 0
    for column in columns:
        values = column.flatten()
        if column.null_count or values.null_count:
            raise UserError(f"{file}: {COLUMN} has nulls from token {position} on; leave those rows out.")
        ids = values.to_numpy(zero_copy_only=False)
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if outside.size:
            raise UserError(
                f"{file}: token id {ids[outside[0]]} at position {position + outside[0]} is outside the vocabulary of "
                f"{vocab_size}; use the tokenizer that the ids were made with, or prepare the data again."
            )
        position += ids.size
        yield ids.astype(token_dtype(vocab_size)).data.cast("B")
    if position == 0:
        raise UserError(f"{file}: {COLUMN} holds no token; leave the file out.")
