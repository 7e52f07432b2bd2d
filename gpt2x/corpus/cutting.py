"""Cutting long texts into pieces whose ids, one after the other, are those of the whole.

Byte-level pre-tokenizers (GPT-2's, Llama 3's, Qwen's, GPT-4o's) never join a line's first letter or digit to what
stands before it. The line end must follow something visible: GPT-2's pattern takes two spaces in a row apart by what
comes after them, and GPT-4o's joins a line end to a slash. Nor do they join a word to the space behind it, where
another word follows; there a long text without such lines is cut. One without words either, which no tokenizer reads
well, is cut anywhere, since a single word of hundreds of megabytes would take a hundred times its size.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer

from gpt2x.errors import UserError

# Small enough for the processor's caches and for several threads to share a batch; a cut costs nothing.
CHARACTERS_PER_PIECE = 100_000
# Beyond it a text is cut between words; or, where there is none, anywhere.
LONGEST_PIECE = 4 * CHARACTERS_PER_PIECE
# What a tokenizer that must see the whole of a text is given at most; it takes some hundred bytes per character.
LONGEST_WHOLE = 16_000_000
RUN, LONGEST_RUN = re.compile(r"[^\W\d_]+|\d+|\s+|[^\w\s]+|_+"), 10_000
# A letter, a space and a letter; \w also matches digits and the underscore.
BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")

SAMPLES = (("first line\n", "second"), ("f(x);\n", "9 // 10"), ('  "grün"\n', "été"), ("中文。\n", "中文\n"))
WORDS = (("word", " another"), ("it's", " été"), ("3 Größe", " 中文"))


def cut(chunks: Iterable[str]) -> Iterator[str]:
    """Joins and cuts anew so that every piece but the first begins a line with a letter or digit, or where there is no
    such line for LONGEST_PIECE characters, a word.

    Args:
        chunks: of one text, in order, all but the last of CHARACTERS_PER_PIECE.

    Yields:
        Pieces of about the chunks' length, of LONGEST_PIECE at most.
    """
    carried: list[str] = []
    length = 0
    for chunk in chunks:
        length += len(chunk)
        position = _last_cut(chunk)
        if position is None and length >= LONGEST_PIECE:
            position = _between_words(chunk) or len(chunk)
        if position is None:
            carried.append(chunk)
        else:
            yield "".join([*carried, chunk[:position]])
            carried = [chunk[position:]]
            length = len(carried[0])
    if length:
        yield "".join(carried)


def chunks_of(text: str) -> Iterator[str]:
    """A text in slices."""
    return (text[start : start + CHARACTERS_PER_PIECE] for start in range(0, len(text), CHARACTERS_PER_PIECE))


def pieces_of(text: str, *, cuts: bool, name: str) -> Iterator[str]:
    """A text in pieces, if it may be cut; a short one is one.

    Raises:
        UserError: names a text that may not be cut and is too long for that.
    """
    if not cuts:
        return iter((as_whole([text], name),))
    return cut(chunks_of(text)) if len(text) > 2 * CHARACTERS_PER_PIECE else iter((text,))


def as_whole(chunks: Iterable[str], name: str) -> str:
    """A text that may not be cut.

    Raises:
        UserError: names a text that is too long for that.
    """
    parts, length = [], 0
    for chunk in chunks:
        parts.append(chunk)
        length += len(chunk)
        if length > LONGEST_WHOLE:
            raise UserError(
                f"{name} has more than {LONGEST_WHOLE:,} characters, and this tokenizer must see a document whole; "
                f"cut it into several (corpus.document_separator for a .txt file)."
            )
    return "".join(parts)


def ids_of(text: str, encoder: Tokenizer, *, cuts: bool, name: str) -> np.ndarray:
    """The ids of one text, however long, (T,) uint32.

    Args:
        text: it.
        encoder: gives the ids.
        cuts: whether it may be given pieces, as can_be_cut says.
        name: of the text, for messages.
    """
    pieces = pieces_of(text, cuts=cuts, name=name)
    parts = [np.array(encoder.encode(piece, add_special_tokens=False).ids, np.uint32) for piece in pieces]
    return np.concatenate(parts)


def without_runs(piece: str) -> str:
    """A piece to train a tokenizer on: without what only a text has that is cut anywhere, words of no language, which
    teach nothing and are kept whole in memory while it is trained."""
    if len(piece) < LONGEST_PIECE:
        return piece
    return RUN.sub(lambda run: run[0] if len(run[0]) < LONGEST_RUN else "", piece)


def _between_words(text: str) -> int | None:
    """Where the last word begins, its space included, or None."""
    places = deque(BETWEEN_WORDS.finditer(text, max(len(text) - 10_000, 0)), maxlen=1)
    return places[0].start() if places else None


def _last_cut(text: str) -> int | None:
    """Where the last line begins that may be cut off, or None."""
    end = text.rfind("\n")
    while end > 0:
        before, after = text[end - 1], text[end + 1 : end + 2]
        if before.isprintable() and before != " " and after.isalnum():
            return end + 1
        end = text.rfind("\n", 0, end)
    return None


def can_be_cut(encoder: Tokenizer) -> bool:
    """Whether a tokenizer gives the pieces of a text the ids of the whole, tried on samples.

    One that puts a space before every text, or that does not cut texts at all, does not.
    """
    added = encoder.get_added_tokens_decoder().values()
    if any("\n" in token.content or token.lstrip or token.rstrip for token in added):
        return False

    def ids(text: str) -> list[int]:
        return encoder.encode(text, add_special_tokens=False).ids

    return all(ids(first + second) == ids(first) + ids(second) for first, second in (*SAMPLES, *WORDS))
