"""How many UTF-8 bytes token ids stand for."""

from collections.abc import Callable, Iterator

import numpy as np
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gpt2x.shards.files import Shard

TOKENS_PER_PIECE = 2**20


def byte_counter(tokenizer: PreTrainedTokenizerFast) -> Callable[[Shard], int]:
    """A function that gives the bytes of a shard's documents; ends of text count none.

    A byte-level tokenizer (GPT-2, Llama 3, Qwen) spells each byte as one letter, so its ids are counted by a table.
    Of any other the documents are decoded; one of more than a million tokens in pieces, which may cost or add a few
    bytes where they meet.
    """
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        lengths = _byte_lengths(tokenizer)
        return lambda shard: sum(int(lengths[part].sum()) for part in _parts(shard.tokens))
    return lambda shard: sum(_decoded_bytes(tokenizer, part) for part in _document_parts(shard))


def _byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Bytes of each id, (vocab_size,) int64."""
    vocabulary, letters = tokenizer.get_vocab(), set(pre_tokenizers.ByteLevel.alphabet())
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        # A special token may be of other letters; those are themselves.
        lengths[number] = len(token) if letters.issuperset(token) else len(token.encode())
    lengths[tokenizer.eos_token_id] = 0
    return lengths


def _decoded_bytes(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> int:
    text_ids = ids[ids != tokenizer.eos_token_id].tolist()
    return len(tokenizer.backend_tokenizer.decode(text_ids, skip_special_tokens=False).encode())


def _document_parts(shard: Shard) -> Iterator[np.ndarray]:
    for start, end in zip(shard.documents[:-1], shard.documents[1:]):
        yield from _parts(shard.tokens[start:end])


def _parts(tokens: np.ndarray) -> Iterator[np.ndarray]:
    return (tokens[start : start + TOKENS_PER_PIECE] for start in range(0, tokens.size, TOKENS_PER_PIECE))
