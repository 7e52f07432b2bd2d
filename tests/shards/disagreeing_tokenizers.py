"""Tokenizers whose tokenizer.json and whose class in transformers do not describe the same."""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

EOS = "<|endoftext|>"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    "hello",
    "Hello",
    "the",
    "over 2024",
    "12345",
    "it's",
    "straße",
    "Ω≈ç",
    "e\u0301te\u0301",
    "日本語",
    "<tool>",
    "x=1;",
]


def texts() -> list[str]:
    """200 texts that tell ways to cut and to normalize apart."""
    chance = random.Random(1)
    blanks = ["", " ", "  ", "\n", "\n\n", "\t"]
    return ["".join(chance.choice(blanks) + chance.choice(WORDS) for _ in range(12)) for _ in range(200)]


def trained(pre_tokenizer, *, normalizer=None, special=(EOS,)) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts() * 3,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return backend


def byte_level(*, prefix=False, own_pattern=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=own_pattern)


def digits():
    return trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]))


def split_pattern():
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    return trained(pre_tokenizers.Sequence([split, byte_level(own_pattern=False)]))


def normalizer():
    return trained(byte_level(), normalizer=normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()]))


def prefix_space():
    return trained(byte_level(prefix=True))


def added_token():
    backend = trained(byte_level())
    backend.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False)])
    return backend


def ignored_merges():
    """Words are taken whole where they are in the vocabulary, as Llama 3's, and most merges are not there at all."""
    content = json.loads(trained(byte_level()).to_str())
    content["model"] |= {"merges": content["model"]["merges"][:20], "ignore_merges": True}
    return Tokenizer.from_str(json.dumps(content))


def sentencepiece():
    """As Llama 2's of the old kind, which puts a blank before every text and after every special token."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=tokens, show_progress=False)
    backend.train_from_iterator(texts() * 3, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # the bytes are part of the vocabulary, not special
    return Tokenizer.from_str(json.dumps(content))


MAKERS = {
    "digits": (digits, "GPT2Tokenizer"),
    "split pattern": (split_pattern, "GPT2Tokenizer"),
    "normalizer": (normalizer, "Qwen2Tokenizer"),
    "prefix space": (prefix_space, "GPT2TokenizerFast"),
    "added token": (added_token, "Qwen2TokenizerFast"),
    "ignored merges": (ignored_merges, "GPT2Tokenizer"),
    "sentencepiece": (sentencepiece, "LlamaTokenizer"),
    "same": (lambda: trained(byte_level()), "GPT2Tokenizer"),
}


def written(name: str, directory: Path, **settings) -> Tokenizer:
    """Writes one of them into a directory as a publisher would, and returns what tokenizer.json describes."""
    make, tokenizer_class = MAKERS[name]
    directory.mkdir(parents=True, exist_ok=True)
    make().save(str(directory / "tokenizer.json"))
    eos = "</s>" if make is sentencepiece else EOS
    config = {"tokenizer_class": tokenizer_class, "eos_token": eos, "chat_template": "{{ messages }}", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_file(str(directory / "tokenizer.json"))
