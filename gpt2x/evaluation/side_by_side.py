"""Computing side by side on a CPU: every core takes a piece of the work instead of a share of every product.

Cores that share a product wait for each other at its end, and a small model has many small products.
"""

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")

# More would wait for Python's lock, which a pass of a small model holds for a part of its time (two are measured).
_MOST_THREADS = 8


def side_by_side(function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
    """The function's results in the order of the pieces, of which each is taken when a core is about to be free.

    The function runs in other threads, to which torch's modes (no_grad, autocast) do not reach.
    """
    num_cores = torch.get_num_threads()
    num_threads = min(num_cores, _MOST_THREADS)
    if num_threads == 1:
        yield from map(function, pieces)
        return
    waiting: deque[Future[Result]] = deque()
    cores_of_each = (num_cores // num_threads,)
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=cores_of_each) as threads:
        try:
            for piece in pieces:
                waiting.append(threads.submit(function, piece))
                if len(waiting) > num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)
            torch.set_num_threads(num_cores)  # which the threads have set for those to come, too


# Of glibc's malloc.h, and the largest sizes that mallopt takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT, _LARGEST_MMAP_THRESHOLD = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, for processes that only compute on a CPU and end.

    glibc gives large blocks back to the system at once and then asks for them anew, page by page, in every pass: a
    sixth of the time of small models. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
