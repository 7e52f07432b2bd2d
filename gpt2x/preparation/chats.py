"""Conversations: read from rows in whatever layout, encoded by the chat template, cut to a length, written."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gpt2x.config import ChatSection, CorpusSection
from gpt2x.corpus.chat_layouts import Message
from gpt2x.corpus.cutting import LONGEST_WHOLE, can_be_cut, ids_of
from gpt2x.corpus.documents import Reading, is_validation
from gpt2x.corpus.rows import Row, text_of
from gpt2x.errors import UserError
from gpt2x.preparation.plan import Plan
from gpt2x.shards.writer import ShardWriter
from gpt2x.tokenizers.bpe import text_encoder
from gpt2x.tokenizers.chat_template import ChatEncoder, EncodedChat

CONVERSATIONS_PER_REPORT = 100
UNLEARNED = "without anything to learn"


class Chat(NamedTuple):
    """A conversation, or a plain text among conversations."""

    name: str
    """Of its row: file or dataset, and number."""
    messages: list[Message] | None
    """None for a plain text."""
    text: str
    """The plain text, or the conversation as JSON: the same for every layout, so the same conversation falls on the
    same side of the split wherever it comes from."""
    is_validation: bool
    """Whether it is held out."""


def read_chats(reading: Reading, corpus: CorpusSection, *, dropped: Counter[str]) -> Iterator[Chat]:
    """The conversations of a share, in order. What is not UTF-8 is left out, and so are plain texts that are empty.

    Args:
        reading: what to read, opened as chat.
        corpus: decides what is held out.
        dropped: counts what was left out, by reason.

    Raises:
        UserError: names the row that does not hold what the corpus' layout says.
    """
    for row in reading.rows:
        assert isinstance(row, Row), "a file without columns is refused before it is read"
        columns = row.columns(dropped)
        if columns is None:
            continue
        assert reading.layout is not None, "where there is a row, there is a layout"
        reading.layout.columns_in(list(columns), row.name)
        messages = None if reading.layout.is_plain_text else reading.layout.messages(columns, row.name)
        text = _plain_text(columns, row.name, dropped) if messages is None else _as_json(messages, dropped)
        if text is not None:
            yield Chat(row.name, messages, text, is_validation(text, corpus))


def _plain_text(columns: dict, name: str, dropped: Counter[str]) -> str | None:
    text = columns["text"]
    if isinstance(text, list):
        raise UserError(f"{name}: column 'text' holds a list; name a column of messages messages, or give text.")
    return text_of(text, name=name, column="text", dropped=dropped)


def _as_json(messages: list[Message], dropped: Counter[str]) -> str | None:
    text = json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)
    # JSON can spell half of a surrogate pair, which no UTF-8 and no tokenizer can.
    return text_of(text, name="", column="", dropped=dropped)


def spoken_text(chat: Chat) -> str:
    """What is said in a conversation, to train a tokenizer on."""
    return chat.text if chat.messages is None else "\n\n".join(message["content"] for message in chat.messages)


def write_chats(
    plan: Plan, reading: Reading, writers: dict[str, ShardWriter], *, dropped: Counter[str]
) -> Iterator[int]:
    """Encodes and writes conversations.

    Yields:
        How many tokens have been written since it was told before, about every hundredth conversation.

    Raises:
        UserError: what reading and encoding raise, and for a conversation without anything to learn.
    """
    encode, num_tokens = _Encode(plan), 0
    for number, chat in enumerate(read_chats(reading, plan.recipe.corpus, dropped=dropped), start=1):
        encoded = encode(chat, dropped)
        if encoded is not None:
            writer = writers["validation" if chat.is_validation else "train"]
            writer.add(chat.name, encoded.ids, encoded.num_bytes, targets=encoded.targets)
            writer.end_document()
            num_tokens += encoded.ids.size
        if number % CONVERSATIONS_PER_REPORT == 0:
            yield num_tokens
            num_tokens = 0
    yield num_tokens


class _Encode:
    """Conversations and plain texts to ids, targets and bytes, all cut to max_length."""

    def __init__(self, plan: Plan) -> None:
        assert plan.recipe.chat is not None, "the recipe has a chat section"
        self.section: ChatSection = plan.recipe.chat
        self.tokenizer = plan.tokenizer
        self._texts = text_encoder(plan.tokenizer)
        self._cuts = can_be_cut(self._texts)
        self._chats: ChatEncoder | None = None

    def __call__(self, chat: Chat, dropped: Counter[str]) -> EncodedChat | None:
        """None for a conversation to leave out, after counting it."""
        whole = self._text(chat.text, chat.name) if chat.messages is None else self._chat(chat.messages, chat.name)
        found = self._cut(whole)
        # The first token of a document is never predicted.
        if found.targets[1:].any():
            return found
        if not self.section.drop_unlearned:
            raise UserError(f"{chat.name} {self._complaint(whole)}.")
        dropped[UNLEARNED] += 1
        return None

    def _text(self, text: str, name: str) -> EncodedChat:
        found = ids_of(text, self._texts, cuts=self._cuts, name=name)
        ids = np.append(found, self.tokenizer.eos_token_id).astype(np.int64)
        return EncodedChat(ids=ids, targets=np.ones(ids.size, bool), num_bytes=len(text.encode()))

    def _chat(self, messages: list[Message], name: str) -> EncodedChat:
        if not messages:
            return EncodedChat(ids=np.array([], np.int64), targets=np.array([], bool), num_bytes=0)
        if sum(len(message["content"]) for message in messages) > LONGEST_WHOLE:
            raise UserError(f"{name} has more than {LONGEST_WHOLE:,} characters; cut it into several or leave it out.")
        if self._chats is None:  # a corpus of plain texts needs no template
            self._chats = ChatEncoder(self.tokenizer, learn=self.section.learn)
        return self._chats.encode(messages, name=name)

    def _cut(self, chat: EncodedChat) -> EncodedChat:
        """The bytes of what is cut off are those of its text, to a few where the cut goes through a character."""
        limit = self.section.max_length
        if limit is None or chat.ids.size <= limit:
            return chat
        lost = chat.ids[limit:][chat.targets[limit:]]
        text = self.tokenizer.decode(lost, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        num_bytes = max(chat.num_bytes - len(text.encode()), 0)
        return EncodedChat(ids=chat.ids[:limit], targets=chat.targets[:limit], num_bytes=num_bytes)

    def _complaint(self, whole: EncodedChat) -> str:
        dropping = "set chat.drop_unlearned true to leave such conversations out"
        if whole.targets[1:].any():
            return (
                f"has nothing to learn in its first {self.section.max_length} of {whole.ids.size} tokens; raise "
                f"chat.max_length, or {dropping}"
            )
        return f"has nothing to learn, for the assistant says nothing in it; remove it, or {dropping}"
