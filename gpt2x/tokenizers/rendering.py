"""Rendering chat templates within bounds: they come with models from the Hub, and are programs.

The sandbox is transformers' own, and what it renders is the same. What could make much out of little at a stroke
(``'a' * 4000000000``) is looked at before, and what is built up step by step while it grows.
"""

import contextlib
import functools
import math
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import BuiltinMethodType, FrameType
from typing import Any

from jinja2 import Template, pass_eval_context
from jinja2.sandbox import SecurityError
from transformers.utils.chat_template_utils import _compile_jinja_template

LONGEST_S, TICK_S = 20.0, 0.05
LONGEST_TEXT = 64_000_000
LARGEST_NUMBER, LARGEST_PRODUCT = 1_000_000, 1_000_000_000
MOST_MEMORY = 2_000_000_000
# A width in a format, as %9999999d and {:>9999999} have.
WIDTH = re.compile(r"\d{7,}")
# What can write more than it is given; filters and methods of texts.
FILTERS = ("batch", "center", "indent", "replace", "tojson", "wordwrap")
METHODS = ("center", "expandtabs", "join", "ljust", "replace", "rjust", "zfill")

Span = tuple[int, int]


class TemplateBoundError(SecurityError):
    """A template that takes more time or memory than a conversation can need."""


def render(
    source: str, messages: Sequence[Mapping[str, str]], *, tracks: bool, **variables: Any
) -> tuple[str, list[Span]]:
    """What a template writes, and the spans between its generation tags.

    Args:
        source: the template.
        messages: of one conversation.
        tracks: whether it has generation tags.
        variables: what else it reads, as apply_chat_template gives it.

    Raises:
        TemplateError: what the template raises; TemplateBoundError where it takes too much time or memory. In another
            thread than the main one time and growing memory are not watched.
    """
    template = compiled(source)
    blocks: list[str] = []
    spans: list[Span] = []
    environment: Any = template.environment
    known = {"messages": [dict(message) for message in messages], "tools": None, "documents": None, **variables}
    length = 0
    with _watched(), environment.activate_tracker(blocks, spans) if tracks else contextlib.nullcontext():
        for block in template.generate(**known):
            blocks.append(block)
            length += len(block)
            _refuse_if(length > LONGEST_TEXT, f"it writes more than {LONGEST_TEXT:,} characters")
    return "".join(blocks), spans


@lru_cache(maxsize=16)
def compiled(source: str) -> Template:
    """A template in transformers' sandbox, with bounds; these hold for what is constant in it and worked out here.

    Raises:
        TemplateError: where it is no Jinja.
    """
    with _watched():
        return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> Any:
    found: Any = _compile_jinja_template("").environment
    call, wrap_str_format = found.call, found.wrap_str_format

    def bounded_call(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, BuiltinMethodType) and function.__name__ in METHODS:
            if function.__name__ == "join":
                args = tuple(list(one) for one in args)
            _check(function.__self__, *args, *kwargs.values())
        return call(context, function, *args, **kwargs)

    def bounded_format(value: Any) -> Any:
        wrapped = wrap_str_format(value)
        if wrapped is None:
            return None
        return _checked(wrapped, functools.partial(_check_format, value.__self__))

    vars(found).update(call=bounded_call, wrap_str_format=bounded_format, concat=_concatenated)
    found.intercepted_binops = frozenset(BOUNDED)
    found.binop_table = found.binop_table | BOUNDED
    found.filters = found.filters | {name: _checked(found.filters[name], _check) for name in FILTERS}
    found.filters["format"] = _checked(found.filters["format"], _check_format)
    found.filters["join"] = _joined(found.filters["join"])
    return found


# --- at a stroke -----------------------------------------------------------------------------------------------------


def _refuse_if(is_too_much: bool, what: str) -> None:
    if is_too_much:
        raise TemplateBoundError(what)


def _check(*values: Any) -> None:
    """Refuses what could come to more than any conversation: long texts times long texts, and widths."""
    sizes = sorted(_size(value) for value in values if isinstance(value, str | list | tuple | dict))
    numbers = [abs(value) for value in values if isinstance(value, int)]
    is_large = math.prod(size + 1 for size in sizes[-2:]) > LARGEST_PRODUCT or max(numbers, default=0) > LARGEST_NUMBER
    _refuse_if(is_large, "it makes a text that is longer than any conversation")


def _check_format(text: Any, *values: Any) -> None:
    _refuse_if(isinstance(text, str) and WIDTH.search(text) is not None, "it formats something too wide")
    # As a width of its own a number must be small; as what is written it may be large.
    is_width_given = isinstance(text, str) and ("*" in text or ":{" in text)
    _check(text, *(value for value in values if is_width_given or not isinstance(value, int)))


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, dict) else value
    return sum(len(item) if isinstance(item, str) else 1 for item in items)


def _checked(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        check(*args, *kwargs.values())
        return function(*args, **kwargs)

    return bounded


def _joined(join: Callable[..., Any]) -> Callable[..., Any]:
    @pass_eval_context
    def bounded(context: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        items = list(value)
        _check(items, d)
        return join(context, items, d, attribute)

    return bounded


def _concatenated(parts: Iterable[str]) -> str:
    found = list(parts)
    _refuse_if(sum(map(len, found)) > LONGEST_TEXT, f"it makes a text of more than {LONGEST_TEXT:,} characters")
    return "".join(found)


def _product(left: Any, right: Any) -> Any:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(times, int):
            _refuse_if(len(sequence) * times > LARGEST_NUMBER, f"it repeats something {times:,} times")
    if isinstance(left, int) and isinstance(right, int):
        _refuse_if(left.bit_length() + right.bit_length() > LARGEST_NUMBER, "it makes a number of too many digits")
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _refuse_if(left.bit_length() * right > LARGEST_NUMBER, "it makes a number of too many digits")
    return left**right


def _rest(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _check_format(left, *(right if isinstance(right, tuple) else (right,)))
    return left % right


BOUNDED: dict[str, Callable[[Any, Any], Any]] = {"*": _product, "**": _power, "%": _rest}


# --- step by step ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Ends what takes longer than LONGEST_S or MOST_MEMORY more than before. Only the main thread hears the clock."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    end, most = time.monotonic() + LONGEST_S, _peak_memory() + MOST_MEMORY

    def look(_signal: int, _frame: FrameType | None) -> None:
        _refuse_if(time.monotonic() > end, f"it is not done after {LONGEST_S:.0f} s")
        _refuse_if(_peak_memory() > most, f"it takes more than {MOST_MEMORY:,} bytes of memory")

    handler = signal.signal(signal.SIGALRM, look)
    waiting, interval = signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if waiting:  # somebody else's clock goes on
            signal.setitimer(signal.ITIMER_REAL, max(waiting - (time.monotonic() - started), 1e-6), interval)


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
