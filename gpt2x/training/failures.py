"""What may fail without ending a run: trackers, samples, plots, pushes."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Failures:
    """Counts failures by what failed, and keeps the last of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._last: dict[str, str] = {}

    @contextmanager
    def tolerated(self, what: str, *, say: Callable[[str], None]) -> Iterator[None]:
        """Lets the block fail: the first time says so, after that only counts.

        Args:
            what: names the block, as "tracker".
            say: takes the line.
        """
        try:
            yield
        # Trackers, plots and generation raise whatever their libraries and networks raise; the run is worth more.
        except Exception as error:
            self._counts[what] += 1
            self._last[what] = " ".join(f"{type(error).__name__}: {error}".split())
            if self._counts[what] == 1:
                say(f"{what} failed ({self._last[what]}); the run goes on.")

    def summary(self) -> list[str]:
        """A line for each thing that failed."""
        return [f"{what} failed {count} x, last: {self._last[what]}" for what, count in self._counts.items()]
