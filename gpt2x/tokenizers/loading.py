"""Loading a tokenizer: the ids are those that its own files give, whatever class of transformers reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from gpt2x.errors import UserError
from gpt2x.files import DamagedError, read_json
from gpt2x.locate import find_tokenizer, from_pretrained, holds_tokenizer, no_tokenizer

# What decides which ids a text gets, by the names of tokenizer.json.
_PARTS = ("normalizer", "pre_tokenizer", "model", "added_tokens")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a directory or the Hub.

    Raises:
        UserError: what open_tokenizer raises, and where there is no end of text.
    """
    tokenizer = open_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise UserError(f"'{path}' has no end-of-text token; set eos_token in its tokenizer_config.json.")
    return tokenizer


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer, with or without an end of text.

    The class that its tokenizer_config.json or the model's type names may build another one from the vocabulary than
    tokenizer.json describes; then tokenizer.json counts.

    Raises:
        UserError: where there is none, where it has no fast implementation, where no class gives the ids of its own
            files, and for tokens that would get other ids than these say.
    """
    directory = find_tokenizer(str(path))
    if not holds_tokenizer(directory):
        raise no_tokenizer(str(path))
    stated = _backend_of(directory)
    tokenizer = _by_its_class(directory)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"'{path}': {type(tokenizer).__name__} has no fast implementation; use one with a tokenizer.json."
        )
    if stated is not None and _differing_part(tokenizer, stated):
        named, tokenizer = type(tokenizer).__name__, _by_its_file(directory, tokenizer, stated)
        if part := _differing_part(tokenizer, stated):
            raise UserError(
                f"'{path}': its tokenizer_class ({named}) gives other ids than its tokenizer.json, which has another "
                f"{part}; set tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast."
            )
    _check_ids(tokenizer, directory)
    return tokenizer


def is_saved(path: str | Path) -> bool:
    """Whether a directory holds a tokenizer as we write them."""
    return (Path(path) / "tokenizer.json").is_file()


def _backend_of(directory: Path) -> Tokenizer | None:
    """What tokenizer.json describes; None where there is none."""
    file = directory / "tokenizer.json"
    if not file.exists():
        return None
    _read(file)  # what tokenizers itself would wait for, or die of, is refused
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the very class that tokenizers raises
        raise UserError(f"{file} is no tokenizer ({error}); restore it, or give another tokenizer.") from error


def _by_its_class(directory: Path) -> Any:
    has_config = any((directory / name).exists() for name in ("tokenizer_config.json", "config.json"))
    if has_config:
        return from_pretrained(AutoTokenizer, directory)
    # OpenAI's two files are read by no Auto class without a config.
    alone = PreTrainedTokenizerFast if is_saved(directory) else GPT2Tokenizer
    return from_pretrained(alone, directory)


def _by_its_file(directory: Path, by_class: PreTrainedTokenizerFast, stated: Tokenizer) -> PreTrainedTokenizerFast:
    """What tokenizer.json describes, with the settings of the config and the special tokens that the class adds."""
    known = {
        name: token
        for name, token in by_class.special_tokens_map.items()
        if isinstance(token, str) and stated.token_to_id(token) is not None
    }
    return from_pretrained(PreTrainedTokenizerFast, directory, model_input_names=by_class.model_input_names, **known)


def _differing_part(tokenizer: PreTrainedTokenizerFast, stated: Tokenizer) -> str | None:
    """What of two backends is not the same, as far as it changes ids; of added tokens those of the file count."""
    ours, theirs = (_deciding(backend) for backend in (tokenizer.backend_tokenizer, stated))
    for part in _PARTS[:-1]:
        if ours[part] != theirs[part]:
            return part
    has_all = all(token in ours["added_tokens"] for token in theirs["added_tokens"])
    return None if has_all else "added_tokens"


def _deciding(backend: Tokenizer) -> dict[str, Any]:
    everything = json.loads(backend.to_str())
    content = {part: everything[part] for part in _PARTS}
    content["model"] = {key: value for key, value in content["model"].items() if value not in (None, "", False)}
    content["pre_tokenizer"] = _without_offsets(content["pre_tokenizer"])
    # Only where there is a normalizer does it matter whether a token is looked for before or after it.
    left_out = {"special"} if content["normalizer"] else {"special", "normalized"}
    content["added_tokens"] = [
        {key: value for key, value in token.items() if key not in left_out} for token in content["added_tokens"]
    ]
    return content


def _without_offsets(step: Any) -> Any:
    if isinstance(step, dict):
        return {key: _without_offsets(value) for key, value in step.items() if key != "trim_offsets"}
    return [_without_offsets(value) for value in step] if isinstance(step, list) else step


def _check_ids(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Refuses tokens that transformers adds by itself or gives other ids than the files do."""
    listed = _listed_ids(directory)
    if not listed:
        return
    roles = {str(token): role for role, token in tokenizer.special_tokens_map.items()}
    for token, number in tokenizer.get_vocab().items():
        if token not in listed:
            raise UserError(
                f"'{directory}': {roles.get(token, 'the token')} {token!r} is not in the vocabulary and would get the "
                f"new id {number}; name a token of the vocabulary in tokenizer_config.json, or add it to "
                f"tokenizer.json."
            )
        if listed[token] != number:
            raise UserError(
                f"'{directory}': {roles.get(token, 'the token')} {token!r} has the id {listed[token]} in the files "
                f"and would get {number}; correct tokenizer.json: before the id of an added token there is no gap."
            )


def _listed_ids(directory: Path) -> dict[str, int]:
    """The id of every token by the files, later ones over earlier; nothing for forms that are not JSON."""
    listed: dict[str, int] = {}
    if is_saved(directory):
        content = _read(directory / "tokenizer.json")
        vocabulary = content["model"].get("vocab", {})
        if isinstance(vocabulary, Mapping):
            listed |= vocabulary
        else:
            listed |= {piece[0]: number for number, piece in enumerate(vocabulary)}
        listed |= {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    else:
        listed |= _read(directory / "vocab.json")
    if listed:
        listed |= {
            token: number for token, number in _read(directory / "added_tokens.json").items() if token not in listed
        }
        for number, token in (_read(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
            listed.setdefault(token["content"], int(number))
    return listed


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file, dict[str, Any]) if file.exists() else {}
    except DamagedError as error:
        raise UserError(f"{error}; restore it, or give another tokenizer.") from error
