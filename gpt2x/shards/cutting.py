"""Cutting long texts into pieces whose ids, one after the other, are those of the whole.

Byte-level pre-tokenizers (GPT-2's, Llama 3's, Qwen's, GPT-4o's) never join a line's first letter or digit to what
stands before it. The line end must follow something visible: GPT-2's pattern takes two spaces in a row apart by what
comes after them, and GPT-4o's joins a line end to a slash.
"""

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

# Small enough for the processor's caches and for several threads to share a batch; a cut costs nothing.
CHARACTERS_PER_PIECE = 100_000

SAMPLES = (("first line\n", "second"), ("f(x);\n", "9 // 10"), ('  "grün"\n', "été"), ("中文。\n", "中文\n"))


def cut(chunks: Iterable[str]) -> Iterator[str]:
    """Joins and cuts anew so that every piece but the first begins a line with a letter or digit.

    Args:
        chunks: of one text, in order.

    Yields:
        Pieces of about the chunks' length; longer where there is no such line.
    """
    carried: list[str] = []
    for chunk in chunks:
        position = _last_cut(chunk)
        if position is None:
            carried.append(chunk)
        else:
            yield "".join([*carried, chunk[:position]])
            carried = [chunk[position:]]
    if carried:
        yield "".join(carried)


def chunks_of(text: str) -> Iterator[str]:
    """A text in slices."""
    return (text[start : start + CHARACTERS_PER_PIECE] for start in range(0, len(text), CHARACTERS_PER_PIECE))


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

    return all(ids(first + second) == ids(first) + ids(second) for first, second in SAMPLES)
