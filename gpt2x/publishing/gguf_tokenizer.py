"""A byte-level BPE tokenizer as GGUF holds it."""

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerFast

from gpt2x.errors import UserError

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# The pattern that cuts the text, by the name under which llama.cpp has it built in.
_NAMES_OF_PATTERNS = {_LLAMA3_PATTERN: "llama-bpe", _QWEN2_PATTERN: "qwen2"}


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, *, vocab_size: int) -> None:
    """Adds vocabulary, merges, special tokens and chat template to a GGUF file.

    Args:
        writer: of the file.
        tokenizer: a byte-level BPE.
        vocab_size: rows of the model's embedding; rows beyond the tokenizer become unused tokens.

    Raises:
        UserError: where llama.cpp does not know the tokenizer's kind, or it has more tokens than the model.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(backend))
    tokens, types = _tokens(tokenizer, backend, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in _merges(backend)])
    for kind in ("bos", "eos", "pad"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{kind}_token_id")(token_id)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer_name(backend: dict[str, Any]) -> str:
    """The name under which llama.cpp knows how a tokenizer cuts text: gpt-2, llama-bpe, qwen2 or smollm.

    Raises:
        UserError: where it is none of these.
    """
    normalizer = (backend.get("normalizer") or {"type": "NFC"})["type"]
    if normalizer != "NFC":  # which leaves almost every text as it is; Qwen's tokenizers have it
        raise UserError(
            f"the tokenizer's normalizer ({normalizer}) must be none or NFC, since llama.cpp applies no other; "
            "export to onnx."
        )
    model, cut = backend["model"], backend["pre_tokenizer"] or {"type": "none"}
    steps = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    types = [step["type"] for step in steps]
    is_byte_level = types[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]
    if model["type"] == "BPE" and is_byte_level:
        by_own_pattern = steps[-1].get("use_regex", True)
        if types == ["ByteLevel"] and by_own_pattern:
            return "gpt-2"
        if types == ["Digits", "ByteLevel"] and by_own_pattern and steps[0]["individual_digits"]:
            return "smollm"
        pattern = steps[0].get("pattern", {}).get("Regex")
        if types == ["Split", "ByteLevel"] and not by_own_pattern and pattern in _NAMES_OF_PATTERNS:
            return _NAMES_OF_PATTERNS[pattern]
    raise UserError(
        f"the tokenizer ({model['type']}, pre-tokenizer {' + '.join(types)}) is none that llama.cpp knows; GGUF takes "
        "byte-level BPE with the pattern of GPT-2, Llama 3, Qwen2 or SmolLM. Export to onnx."
    )


def _merges(backend: dict[str, Any]) -> list[Any]:
    return backend["model"]["merges"]


def _tokens(
    tokenizer: PreTrainedTokenizerFast, backend: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[gguf.TokenType]]:
    """The token of each id, and what kind it is."""
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= vocab_size:
        raise UserError(
            f"vocab_size ({vocab_size}) must be more than the tokenizer's largest id ({max(vocabulary.values())}); "
            "give the tokenizer that the model was trained with."
        )
    tokens = [f"[UNUSED{token_id}]" for token_id in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, token_id in vocabulary.items():
        tokens[token_id], types[token_id] = token, gguf.TokenType.NORMAL
    for added in backend["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        types[added["id"]] = kind
    return tokens, types
