"""Tokenizers of the kinds that chat templates meet, trained in a moment; OpenAI's own where it is at hand."""

import json

from published_data import needed
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = "Hello, how are you?\n\nassistant\nuser\n  I am  fine.\n\n\nThe answer is 42!\n Hello hello. système 日本 "


def byte_level(pre_tokenizer):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    return _trained(backend, trainer, [WORDS] * 5)


def sentencepiece(*, prepends):
    """As Llama 2's, of the old kind that begins every piece of text with a blank, or of the new."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prepends:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokens = ["<unk>", *byte_tokens]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False)
    return _trained(backend, trainer, WORDS.splitlines() * 5)


def _trained(backend, trainer, texts):
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())
    model["added_tokens"] = []  # the byte tokens are part of the vocabulary, not special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(model)))
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    return tokenizer


def stripping():
    """As Phi 3's: its special tokens swallow the blanks behind them."""
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens(
        [AddedToken(t, special=True, rstrip=True) for t in ("<|im_start|>", "<|im_end|>")], special_tokens=True
    )
    return tokenizer


def llama3():
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    return byte_level(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))


def real_gpt2():
    return AutoTokenizer.from_pretrained(needed("gpt2-tokenizer"))


MAKERS = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama3": llama3,
    "sentencepiece": lambda: sentencepiece(prepends=False),
    "old sentencepiece": lambda: sentencepiece(prepends=True),
    "stripping": stripping,
    "real gpt2": real_gpt2,
}
