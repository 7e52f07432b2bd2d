"""Conversations by a chat template: their ids, and which of them the assistant says."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from gpt2x.config import ChatSection
from gpt2x.config.parts import shipped_or
from gpt2x.corpus.rows import is_unicode
from gpt2x.errors import UserError
from gpt2x.tokenizers.rendering import compiled, render
from gpt2x.tokenizers.special_tokens import SecondNames, Span

# Unicode reserves these for use inside a program (The Unicode Standard, section 23.7); text has none.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# What a template can raise that compiles: its own complaints, and those of the operations and filters in it.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
# Written like this, a token is meant to be one.
TOKEN_IN_A_TEMPLATE = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as a model reads it."""

    ids: np.ndarray
    """Token ids, (T,) int64."""
    targets: np.ndarray
    """Which of them are learned, (T,) bool."""
    num_bytes: int
    """UTF-8 bytes of the text that is learned, special tokens not counted."""


class ChatEncoder:
    """Encodes conversations by the tokenizer's chat template.

    The ids are those of transformers' ``apply_chat_template``, with two exceptions: text that spells a special token
    stays text, and no token holds the end of a prompt together with the beginning of its answer, because the model
    will be asked with the prompt alone.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, learn: Literal["assistant", "all"] = "assistant"
    ) -> None:
        """Raises UserError where the tokenizer has no chat template, or none that says what there is to learn."""
        if tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template; name one, such as chat.template tokenization/chatml.jinja."
            )
        self._template = _template_of(tokenizer)
        self._has_spans = GENERATION_TAG.search(self._template) is not None
        if learn == "assistant" and not self._has_spans:
            raise UserError(
                "the chat template has no {% generation %} around what the assistant says, so that cannot be learned "
                "alone; set chat.template tokenization/chatml.jinja, or chat.learn all."
            )
        self._tokenizer, self._learn = tokenizer, learn
        self._second_names: dict[str, SecondNames] = {}

    def encode(self, messages: Sequence[Mapping[str, Any]], *, name: str) -> EncodedChat:
        """Encodes a whole conversation.

        Args:
            messages: each with its role and its content; one with learned: False is not learned.
            name: what a complaint calls the conversation, its file and row say.

        Raises:
            UserError: where a message is no text, or the template refuses it.
        """
        texts = [{key: value for key, value in message.items() if key != "learned"} for message in messages]
        names, text, spans = self._render(texts, name, add_generation_prompt=False)
        learned = self._learned(spans, messages, name) if self._learn == "assistant" else [(0, len(text))]
        if self._learn == "all" and any(message.get("learned") is False for message in messages):
            raise UserError(
                f"{name} has a turn that is not to be learned, and chat.learn all learns everything; set it to "
                f"assistant, or leave the turn's train, loss or weight out."
            )
        ids, targets = names.encode(text, spans, learned)
        return EncodedChat(ids, targets, sum(names.num_bytes(text[start:end]) for start, end in learned))

    def _learned(self, spans: list[Span], messages: Sequence[Mapping[str, Any]], name: str) -> list[Span]:
        """The spans of the assistant's turns without those that are not to be learned."""
        is_learned = [one.get("learned") is not False for one in messages if one["role"] == "assistant"]
        if all(is_learned):
            return spans
        if len(spans) != len(is_learned):
            raise UserError(
                f"{name} has a turn that is not to be learned, and the chat template does not write each turn of the "
                f"assistant by itself; use another template, or leave the row out."
            )
        return [span for span, learned in zip(spans, is_learned, strict=True) if learned]

    def prompt(self, messages: Sequence[Mapping[str, str]], *, name: str = "the conversation") -> list[int]:
        """Ids of a conversation and of the beginning of the assistant's next turn.

        Raises:
            UserError: where a message is no text, or the template refuses it.
        """
        names, text, spans = self._render(messages, name, add_generation_prompt=True)
        return names.encode(text, spans, [])[0].tolist()

    def _render(
        self, messages: Sequence[Mapping[str, str]], name: str, *, add_generation_prompt: bool
    ) -> tuple[SecondNames, str, list[Span]]:
        """The conversation with special tokens by their second names, and the spans of it the assistant says."""
        _check_messages(messages, name)
        names = self._names_for(messages, name)
        swapped = [{key: names.swap(value) for key, value in message.items()} for message in messages]
        try:
            rendered, spans = render(
                self._template,
                swapped,
                tracks=self._has_spans,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        except TEMPLATE_ERRORS as error:
            reason = _reason(error)
            raise UserError(f"{name}: the chat template refuses it ({reason}); correct or remove it.") from None
        return names, *names.swap_between(rendered, spans)

    def _names_for(self, messages: Sequence[Mapping[str, str]], name: str) -> SecondNames:
        texts = [text for message in messages for text in message.values()]
        for noncharacter in NONCHARACTERS:
            if not any(noncharacter in text for text in texts):
                if noncharacter not in self._second_names:
                    self._second_names[noncharacter] = SecondNames(self._tokenizer, noncharacter)
                return self._second_names[noncharacter]
        raise UserError(f"{name} holds every code point from U+FDD0 to U+FDEF, which are no characters; remove them.")


def _check_messages(messages: Sequence[Mapping[str, str]], name: str) -> None:
    if not messages:
        raise UserError(f"{name} holds no message; remove it.")
    for number, message in enumerate(messages, 1):
        for key in {"role": None, "content": None} | dict(message):
            value = message.get(key)
            if not isinstance(value, str):
                found = "missing" if key not in message else "null" if value is None else type(value).__name__
                raise UserError(f"{name}: the {key} of message {number} is {found}, not text; correct or remove it.")
            if not is_unicode(value):
                raise UserError(
                    f"{name}: the {key} of message {number} holds half of a surrogate pair, which is no text; "
                    "correct or remove it."
                )


def chat_tokenizer(tokenizer: PreTrainedTokenizerFast, section: ChatSection) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer that writes and ends conversations as a recipe says.

    Its end of text is the end of the assistant's turn. It pads with what it padded with before, or else with its old
    end of text.

    Raises:
        UserError: where the template is missing or no Jinja, writes a token that is no special one, or does not end
            the assistant's turn with the end of text.
    """
    tokenizer = copy.deepcopy(tokenizer)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    new = [token for token in section.special_tokens if token not in special]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if section.end_of_turn is not None:
        _check_known(tokenizer, section.end_of_turn, "chat.end_of_turn is")
        tokenizer.eos_token = section.end_of_turn
    if section.template is not None:
        tokenizer.chat_template = _read_template(section)
    if tokenizer.chat_template is not None:
        template = re.sub(r"\{#.*?#\}", "", _template_of(tokenizer), flags=re.DOTALL)
        for token in TOKEN_IN_A_TEMPLATE.findall(template):
            _check_known(tokenizer, token, f"{section.template or 'the chat template'} writes")
        _check_end_of_turn(tokenizer, section)
    return tokenizer


def _read_template(section: ChatSection) -> str:
    assert section.template is not None
    try:
        template = shipped_or(section.template).read_text(encoding="utf-8-sig")
        compiled(template)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat.template ({section.template}) cannot be read ({_reason(error)}); correct the path."
        ) from None
    except TemplateSyntaxError as error:
        raise UserError(
            f"chat.template ({section.template}), line {error.lineno}, is no Jinja ({error.message}); correct it."
        ) from None
    except TEMPLATE_ERRORS as error:
        raise UserError(f"chat.template ({section.template}) is no Jinja ({_reason(error)}); correct it.") from None
    return template


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _template_of(tokenizer: PreTrainedTokenizerFast) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            "the tokenizer has several chat templates and no default; name one by chat.template."
        ) from None


def _check_known(tokenizer: PreTrainedTokenizerFast, token: str, who: str) -> None:
    # A text that spells a token which is not special would be encoded as the token itself.
    if token not in {known.content for known in tokenizer.added_tokens_decoder.values() if known.special}:
        raise UserError(f"{who} {token}, which is no special token of the tokenizer; name it in chat.special_tokens.")


def _check_end_of_turn(tokenizer: PreTrainedTokenizerFast, section: ChatSection) -> None:
    """Whatever reads the model stops at the end of text, so the assistant's turn must hold it.

    Where a template does not say what the assistant says, the end of text must stand behind it.
    """
    has_spans = GENERATION_TAG.search(_template_of(tokenizer)) is not None
    if not has_spans and section.learn != "all":
        return  # a conversation is refused, and texts need no template
    answer = "1337"
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    encoder = ChatEncoder(tokenizer, learn="assistant" if has_spans else "all")
    chat = encoder.encode(exchange, name="a question and its answer")
    behind = tokenizer.decode(chat.ids[chat.targets].tolist()).rpartition(answer)[2]
    if tokenizer.eos_token not in behind:
        raise UserError(
            f"the chat template does not end what the assistant says with {tokenizer.eos_token}, the tokenizer's end "
            "of text; set chat.end_of_turn to the token that ends it."
        )
