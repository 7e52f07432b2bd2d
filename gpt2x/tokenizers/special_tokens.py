"""Special tokens by names that no text holds, so that what a template writes differs from what a message spells.

A template writes special tokens as text, and a message may spell the same text. To tell the two apart, special tokens
have a second name while a conversation is encoded, made of a noncharacter that no message of it holds: what a message
spells goes through the template under that name, and afterwards the two are exchanged. The tokenizer that reads the
result knows the tokens by their second name alone.
"""

import re
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
from tokenizers import AddedToken, Encoding, processors
from transformers import PreTrainedTokenizerFast

from gpt2x.tokenizers.bpe import text_encoder

Span = tuple[int, int]


class SecondNames:
    """A tokenizer's special tokens under names that hold a noncharacter, and its backend that knows only these."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, noncharacter: str) -> None:
        special = {id: token for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = {f"{noncharacter}{place}{noncharacter}": id for place, id in enumerate(special)}
        self._swaps = {special[id].content: name for name, id in named.items()}
        self._swaps |= {name: content for content, name in self._swaps.items()}
        self._name = re.compile(f"{noncharacter}\\d+{noncharacter}")
        longest_first = sorted(map(re.escape, self._swaps), key=len, reverse=True)
        self._either = re.compile("|".join(longest_first) or "(?!)")
        self._border = noncharacter * 2

        self._backend = text_encoder(tokenizer)
        self._backend.post_processor = processors.Sequence([])  # one for byte-level BPE takes blanks off the offsets
        self._backend.add_tokens(
            [
                AddedToken(name, lstrip=special[id].lstrip, rstrip=special[id].rstrip, normalized=False)
                for name, id in named.items()
            ]
            + [AddedToken(self._border, normalized=False)]
        )
        vocabulary = self._backend.get_vocab()
        self._border_id = vocabulary[self._border]
        self._first_name_id = min(vocabulary[name] for name in (*named, self._border))
        self._ids = np.arange(max(vocabulary.values()) + 1)
        for name, id in named.items():
            self._ids[vocabulary[name]] = id

    def swap(self, text: str) -> str:
        """Special tokens spelled out get their second names, and second names are spelled out."""
        return self._either.sub(lambda found: self._swaps[found[0]], text)

    def swap_between(self, rendered: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
        """Swaps the names in what a template rendered, and moves the spans along."""
        places = [0, *chain(*spans), len(rendered)]
        pieces = [self.swap(rendered[start:end]) for start, end in pairwise(places)]
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        return "".join(pieces), list(zip(ends[0:-1:2], ends[1::2]))

    def num_bytes(self, text: str) -> int:
        """UTF-8 bytes of a text without its special tokens."""
        return len(self._name.sub("", text).encode())

    def encode(self, text: str, spans: Sequence[Span], learned: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T,) int64 of a text, and which of them lie in what is learned, (T,) bool.

        No token reaches over the beginning or end of a span.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        crossed = self._crossed(encoding, spans, len(text))
        if crossed:
            pieces = [text[start:end] for start, end in pairwise([0, *crossed, len(text)])]
            text = self._border.join(pieces)
            learned = [(self._shifted(start, crossed), self._shifted(end, crossed)) for start, end in learned]
            encoding = self._backend.encode(text, add_special_tokens=False)
        ids, targets = np.array(encoding.ids, np.int64), np.zeros(len(encoding), bool)
        for start, end in learned:
            targets[_token_from(encoding, start, len(text)) : _token_from(encoding, end, len(text))] = True
        kept = ids != self._border_id
        return self._ids[ids[kept]], targets[kept]

    def _crossed(self, encoding: Encoding, spans: Sequence[Span], length: int) -> list[int]:
        """Beginnings and ends of spans that lie inside a token; behind it, a special token may swallow blanks."""
        crossed = []
        for place, is_end in ((place, is_end) for span in spans for place, is_end in zip(span, (False, True))):
            token = _holding(encoding, place, length)
            if _begins_before(encoding, token, place) and not (is_end and encoding.ids[token] >= self._first_name_id):
                crossed.append(place)
        return crossed

    def _shifted(self, place: int, crossed: Sequence[int]) -> int:
        return place + len(self._border) * sum(border <= place for border in crossed)


def _holding(encoding: Encoding, place: int, length: int) -> int:
    """The first token that holds something of a text from this character on, or the number of tokens."""
    found = (encoding.char_to_token(character) for character in range(place, length))
    return next((token for token in found if token is not None), len(encoding))


def _begins_before(encoding: Encoding, token: int, place: int) -> bool:
    characters = encoding.token_to_chars(token) if token < len(encoding) else None
    return characters is not None and characters[0] < place


def _token_from(encoding: Encoding, place: int, length: int) -> int:
    """The first token that begins at this character or behind it, or the number of tokens."""
    token = _holding(encoding, place, length)
    return token + _begins_before(encoding, token, place)
