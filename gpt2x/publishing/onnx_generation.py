"""Text from an ONNX export, by ONNX Runtime, numpy and tokenizers: neither torch nor transformers is needed.

Shapes: B sequences, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors
from tokenizers import Tokenizer
from typing_extensions import TypedDict

from gpt2x.commands import shell_command
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, read_bytes, read_json

Cache = dict[str, onnxruntime.OrtValue]
FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
_UNREADABLE = (
    onnxruntime_errors.NoSuchFile,
    onnxruntime_errors.InvalidProtobuf,
    onnxruntime_errors.InvalidArgument,
    onnxruntime_errors.InvalidGraph,
    onnxruntime_errors.NotImplemented,
    onnxruntime_errors.Fail,
    onnxruntime_errors.RuntimeException,
)
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class _Config(TypedDict):
    max_position_embeddings: NotRequired[int | None]
    n_positions: NotRequired[int | None]
    eos_token_id: NotRequired[int | list[int] | None]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; above, the distribution is flattened (above 1) or sharpened (below 1)."""
    top_k: int | None = None
    """Only the k likeliest tokens are drawn."""
    top_p: float | None = None
    """Only the likeliest tokens that together have this probability are drawn (arXiv:1904.09751)."""
    seed: int = 1337
    """The same seed draws the same tokens."""


class OnnxDecoder:
    """An exported decoder with its tokenizer.

    Attributes:
        tokenizer: its tokenizer.
        eos_token_ids: the tokens that end a text.
        max_length: the longest sequence it takes, in tokens.
    """

    def __init__(self, directory: Path, *, dtype: str = "float32", num_threads: int = 0) -> None:
        """Opens the export in a directory.

        Args:
            directory: what scripts/export.py --to onnx wrote.
            dtype: which of its files: float32, float16 or int8.
            num_threads: threads of ONNX Runtime; 0 for all cores.

        Raises:
            UserError: where the directory has no such file, or a damaged one.
        """
        model_file = directory / "onnx" / FILES[dtype]
        if not model_file.is_file():
            raise UserError(
                f"{model_file} does not exist; `{shell_command('export', 'MODEL', '--to', 'onnx')}` writes it."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        try:
            self._session = onnxruntime.InferenceSession(model_file, options, providers=["CPUExecutionProvider"])
            config = read_json(directory / "config.json", _Config)
            max_length = config.get("max_position_embeddings") or config.get("n_positions")
            if max_length is None:
                raise DamagedError(f"{directory / 'config.json'} has no max_position_embeddings")
            tokenizer_file = directory / "tokenizer.json"
            self.tokenizer = Tokenizer.from_buffer(read_bytes(tokenizer_file)) if tokenizer_file.exists() else None
        except (*_UNREADABLE, DamagedError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the export in {directory} is damaged: {reason}; export again.") from error
        self._cache_inputs = [value for value in self._session.get_inputs() if value.name.startswith("past_")]
        self._outputs = [value.name for value in self._session.get_outputs()]
        self.max_length: int = max_length
        eos = config.get("eos_token_id")
        self.eos_token_ids: list[int] = eos if isinstance(eos, list) else [] if eos is None else [eos]

    def empty_cache(self, batch_size: int) -> Cache:
        """The cache before the first token: keys and values of length 0."""
        cache = {}
        for value in self._cache_inputs:
            _, heads, _, width = value.shape
            empty = np.empty((batch_size, heads, 0, width), _NUMPY_TYPES[value.type])
            cache[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        return cache

    def step(
        self, ids_BT: NDArray[np.int64], mask_BS: NDArray[np.int64], cache: Cache
    ) -> tuple[NDArray[np.float32], Cache]:
        """Reads T more tokens of each sequence.

        Args:
            ids_BT: the new tokens.
            mask_BS: 1 for every token so far, the new ones included, 0 for padding.
            cache: what the step before returned; it stays in ONNX Runtime's memory.

        Returns:
            Logits (B, T, V) of the new tokens, and the cache to go on with.
        """
        positions_BS = np.maximum(mask_BS.cumsum(-1) - 1, 0)
        arrays = {
            "input_ids": ids_BT,
            "attention_mask": mask_BS,
            "position_ids": positions_BS[:, -ids_BT.shape[1] :],
        }
        inputs = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in arrays.items()
        }
        logits, *present = self._session.run_with_ort_values(self._outputs, {**inputs, **cache})
        names = [name.replace("present", "past_key_values") for name in self._outputs[1:]]
        return logits.numpy(), dict(zip(names, present))


def generate(
    decoder: OnnxDecoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling = Sampling()
) -> list[list[int]]:
    """Continues each prompt; the prompts are read as one left-padded batch, and every later step reads one token.

    Args:
        decoder: the model.
        prompts: token ids, at least one each.
        max_new_tokens: length of each continuation; an end-of-text token, which is part of it, ends it earlier.
        sampling: how tokens are chosen.

    Returns:
        The continuations, without their prompts.

    Raises:
        UserError: where a prompt is empty, or a continuation would be longer than the model takes.
    """
    ids_BT, mask_BS = _left_padded(decoder, prompts, max_new_tokens)
    generator = np.random.default_rng(sampling.seed)
    cache = decoder.empty_cache(len(prompts))
    texts: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        logits_BTV, cache = decoder.step(ids_BT, mask_BS, cache)
        tokens_B = sample(logits_BTV[:, -1], sampling, generator)
        for text, token in zip(texts, tokens_B):
            if not _is_ended(decoder, text):
                text.append(int(token))
        if all(_is_ended(decoder, text) for text in texts):
            break
        ids_BT = tokens_B[:, None]
        mask_BS = np.concatenate([mask_BS, np.ones_like(ids_BT)], axis=1)
    return texts


def generate_text(
    decoder: OnnxDecoder, prompts: Sequence[str], *, max_new_tokens: int, sampling: Sampling = Sampling()
) -> list[str]:
    """Continues each text; an empty one starts from the end-of-text token.

    Raises:
        UserError: as `generate`, and where the export has no tokenizer.
    """
    if decoder.tokenizer is None:
        raise UserError("the export has no tokenizer.json; export a model with a tokenizer, or call generate.")
    encoded = [decoder.tokenizer.encode(text, add_special_tokens=False).ids for text in prompts]
    starts = [ids or decoder.eos_token_ids[:1] for ids in encoded]
    continued = generate(decoder, starts, max_new_tokens=max_new_tokens, sampling=sampling)
    return [decoder.tokenizer.decode(ids) for ids in continued]


def sample(logits_BV: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator) -> NDArray[np.int64]:
    """One token per row (B,): the likeliest, or one drawn by inverting the cumulative distribution."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    order_BV = np.argsort(-logits_BV, axis=-1, kind="stable")
    scaled_BV = np.take_along_axis(logits_BV, order_BV, -1).astype(np.float64) / sampling.temperature
    if sampling.top_k is not None:
        scaled_BV[:, sampling.top_k :] = -np.inf
    probabilities_BV = np.exp(scaled_BV - scaled_BV[:, :1])
    probabilities_BV /= probabilities_BV.sum(-1, keepdims=True)
    if sampling.top_p is not None:
        # The token at which the sum passes top_p is still drawn, so there is always one.
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        probabilities_BV[before_BV >= sampling.top_p] = 0
    cumulative_BV = probabilities_BV.cumsum(-1)
    drawn_B1 = generator.random((len(logits_BV), 1)) * cumulative_BV[:, -1:]
    ranks_B1 = (cumulative_BV <= drawn_B1).sum(-1, keepdims=True)
    return np.take_along_axis(order_BV, ranks_B1, -1)[:, 0]


def _left_padded(
    decoder: OnnxDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids (B, T) and attention mask of prompts of different lengths."""
    if not prompts or not all(prompts):
        raise UserError(f"each of the {len(prompts)} prompts must have a token at least; start from the end of text.")
    length = max(len(prompt) for prompt in prompts)
    if length + max_new_tokens > decoder.max_length:
        raise UserError(
            f"max_new_tokens ({max_new_tokens}) after a prompt of {length} tokens is more than the model's "
            f"{decoder.max_length}; shorten one of them."
        )
    ids_BT = np.zeros((len(prompts), length), np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, length - len(prompt) :] = prompt
        mask_BT[row, length - len(prompt) :] = 1
    return ids_BT, mask_BT


def _is_ended(decoder: OnnxDecoder, text: Sequence[int]) -> bool:
    return bool(text) and text[-1] in decoder.eos_token_ids
