"""Tokenizers: training a byte-level BPE, saving, the fingerprint of what determines ids."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gpt2x.addresses import without_secrets
from gpt2x.config import CorpusSection, TokenizerSection
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, make_directory, read_json, whole_directory, write_file
from gpt2x.locate import local_path, say
from gpt2x.tokenizers.encoding import text_reader
from gpt2x.tokenizers.loading import load_tokenizer as load_tokenizer

# Beside a tokenizer that was trained here: on what.
TRAINING_FILE = "training.json"


def train_tokenizer(texts: Iterable[str], section: TokenizerSection) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE (arXiv:1508.07909; GPT-2, section 2.2).

    The text is cut by GPT-2's own pattern, which keeps a line end and the indentation after it in one piece. That of
    Llama 3 gives 0.6% more bytes per token at a vocabulary of 4096 on Python sources (1.5% fewer at 1024) and takes
    twice as long; every reader of tokenizers knows GPT-2's.

    Raises:
        UserError: where the texts do not have enough pairs for a vocabulary of that size.
    """
    assert section.vocab_size is not None, "a tokenizer without vocab_size is loaded, not trained"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=section.vocab_size,
        special_tokens=[section.eos_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size()
    if reached != section.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size ({section.vocab_size}) is more than the training documents are enough for; "
            f"set it to {reached} or less, or give more text."
        )
    eos = section.eos_token
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        bos_token=eos,
        pad_token=eos,
        unk_token=eos,  # as GPT-2's own has it: no text is unknown, but ctranslate2 wants a name
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    *,
    trained_on: Mapping[str, Any] | None = None,
    replaces: bool = False,
) -> None:
    """Saves a tokenizer, whole or not at all, so that AutoTokenizer.from_pretrained(path) loads it without network.

    Args:
        tokenizer: what to save.
        path: its directory; the parents are made.
        trained_on: what to write down beside it, see check_trained_on.
        replaces: whether an older one, which must be ours, gives way.

    Raises:
        UserError: where it cannot be written, and where something else is there.
    """
    make_directory(path.parent)
    with whole_directory(path, replaces=replaces) as directory:
        write_tokenizer(tokenizer, directory)
        if trained_on is not None:
            write_file(directory / TRAINING_FILE, (json.dumps(trained_on, indent=2, sort_keys=True) + "\n").encode())


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes a tokenizer into a directory that is being made, beside a model for example."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    _suit_other_readers(directory / "tokenizer_config.json", chat_template=tokenizer.chat_template)


def _suit_other_readers(config_file: Path, *, chat_template: str | None) -> None:
    """Says in tokenizer_config.json what transformers 5 leaves out, and leaves out how this process loaded it."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the class's older name, the only one others can load
    # Without it transformers 4 makes token_type_ids, which GPT-2 adds to its embeddings and Llama refuses.
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(chat_template, str):
        config["chat_template"] = chat_template  # transformers.js looks here, not into chat_template.jinja
    for name in ("is_local", "local_files_only"):
        config.pop(name, None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def training_of(section: TokenizerSection, corpus: CorpusSection, *, as_chat: bool) -> dict[str, Any]:
    """What a trained tokenizer depends on beside its size, as JSON gives it back."""
    return {
        **{f"corpus.{key}": value for key, value in without_secrets(dataclasses.asdict(corpus)).items()},
        "tokenizer.eos_token": section.eos_token,
        "chat": as_chat,
    }


def check_trained_on(section: TokenizerSection, corpus: CorpusSection, *, as_chat: bool = False) -> None:
    """Refuses a tokenizer that is to be trained on a corpus and was trained on another: on what is now held out,
    perhaps.

    Raises:
        UserError: with what differs. One that does not say what it was trained on is used, with a line.
    """
    if section.vocab_size is None:
        return
    directory, wanted = local_path(section.path), training_of(section, corpus, as_chat=as_chat)
    try:
        found = without_secrets(read_json(directory / TRAINING_FILE, dict[str, Any]))
    except DamagedError as error:
        return say(f"using the tokenizer in {directory}, which does not say what it was trained on ({error})")
    # A record does not list the fields that came after it; they had no effect.
    differing = [key for key in wanted if found.get(key, wanted[key]) != wanted[key]]
    changed = [f"{key} {found[key]!r} -> {wanted[key]!r}" for key in differing]
    if changed:
        raise UserError(
            f"the tokenizer in {directory} was trained by another recipe ({', '.join(changed)}); delete that "
            f"directory to train it again, set another tokenizer.path, or use it as it is by tokenizer.vocab_size "
            f"null."
        )


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id, which is more than the number of tokens where a foreign vocabulary has gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's backend that reads documents: text that spells a special token stays text."""
    return text_reader(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """The sha256 of everything that determines the ids of a document: equal exactly where they are equal."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {part: backend[part] for part in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    parts["eos_token_id"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
