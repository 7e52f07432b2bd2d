"""Token files as other projects write them, by the calls that their own scripts make."""

import struct
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gpt2x.config import TokenizerSection
from gpt2x.errors import UserError
from gpt2x.shards.token_sets import open_tokens
from gpt2x.tokenizers.bpe import save_tokenizer, train_tokenizer

ROWS, INT32 = 7, pa.int32()


def nanogpt(directory: Path, split: str, ids: list[int]) -> Path:
    """data/openwebtext/prepare.py."""
    file = directory / f"{split}.bin"
    array = np.memmap(file, dtype=np.uint16, mode="w+", shape=(len(ids),))
    array[:] = ids
    array.flush()
    return file


def llmc(directory: Path, split: str, ids: list[int], *, magic=20240520, version=1, dtype=np.uint16) -> Path:
    """dev/data/data_common.py, write_datafile; modded-nanogpt's data/fineweb.py is a copy."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids)
    file = directory / f"fineweb_{split}_000000.bin"
    with file.open("wb") as stream:
        stream.write(header.tobytes())
        stream.write(np.array(ids, dtype=dtype).tobytes())
    return file


def llmc_llama(directory: Path, split: str, ids: list[int]) -> Path:
    """The same for the vocabulary of Llama 3."""
    return llmc(directory, split, ids, magic=20240801, version=7, dtype=np.uint32)


def numpy_file(directory: Path, split: str, ids: list[int]) -> Path:
    """build-nanogpt's fineweb.py."""
    file = directory / f"edufineweb_{split}_000000.npy"
    np.save(file, np.array(ids, np.uint16))
    return file


def olmo(directory: Path, split: str, ids: list[int]) -> Path:
    """dolma's tokens: a memmap called .npy, without numpy's header."""
    file = directory / f"part-0-{split}.npy"
    np.memmap(file, dtype=np.uint16, mode="w+", shape=(len(ids),))[:] = ids
    return file


def datatrove(directory: Path, split: str, ids: list[int], *, eos: int = 0, tokenizer: str = "tokenizer") -> Path:
    """pipeline/tokens/tokenizer.py, TokenizedFile: ids, document ends and a description."""
    file = directory / f"00000_{split}_shuffled.ds"
    file.write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    ends = [position + 1 for position, number in enumerate(ids) if number == eos]
    ends += [len(ids)] if ids[-1] != eos else []
    Path(f"{file}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    Path(f"{file}.metadata").write_text(f"{tokenizer}|2\n{len(ids)}\n{len(ids)} T")
    return file


def torch_file(directory: Path, split: str, ids: list[int]) -> Path:
    """A tensor of every number, eight bytes each."""
    file = directory / f"tokens_part_{split}_1.pt"
    torch.save(torch.tensor(ids, dtype=torch.long), file)
    return file


def rows(ids: list[int]) -> list[list[int]]:
    return [ids[start : start + ROWS] for start in range(0, len(ids), ROWS)]


def arrow_stream(directory: Path, split: str, ids: list[int], *, new=pa.ipc.new_stream, kind=INT32) -> Path:
    file, table = directory / f"data-{split}.arrow", pa.table({"input_ids": pa.array(rows(ids), pa.list_(kind))})
    with pa.OSFile(str(file), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return file


def arrow_file(directory: Path, split: str, ids: list[int]) -> Path:
    return arrow_stream(directory, split, ids, new=pa.ipc.new_file, kind=pa.uint16())


def parquet(directory: Path, split: str, ids: list[int]) -> Path:
    file = directory / f"{split}-00000-of-00001.parquet"
    columns = {"input_ids": rows(ids), "text": ["other"] * len(rows(ids))}
    pq.write_table(pa.table(columns), file, row_group_size=5, compression="zstd")
    return file


def dataset(ids: list[int]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": rows(ids), "attention_mask": [[1] * len(r) for r in rows(ids)]})


WRITERS = (
    *(nanogpt, llmc, llmc_llama, numpy_file, olmo, datatrove, torch_file),
    *(arrow_stream, arrow_file, parquet),
)


def tiny_tokenizer(directory: Path) -> str:
    """A byte-level BPE of 300 ids, whose end of text is 0, saved."""
    texts = [f"the {number} quick foxes jump över {number * 7} lazy dögs" for number in range(200)]
    tokenizer = train_tokenizer(texts, TokenizerSection(path="unused", vocab_size=300))
    save_tokenizer(tokenizer, directory / "tokenizer")
    return str(directory / "tokenizer")


def large_tokenizer(directory: Path) -> str:
    """Seventy thousand whole words, more than two bytes number; its end of text is 0."""
    vocabulary = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, 70_000)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    save_tokenizer(tokenizer, directory / "large")
    return str(directory / "large")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (str(self.sentinel), "w")


def tokens_of(path, tokenizer, split="train", **paths) -> list[int]:
    shards = open_tokens(str(path), tokenizer=tokenizer, **paths).open_split(split)
    return np.concatenate([shard.tokens for shard in shards]).tolist()


def refusal(path, tokenizer, **paths) -> str:
    with pytest.raises(UserError) as caught:
        tokens_of(path, tokenizer, **paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)
