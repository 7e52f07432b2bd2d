"""How far a preparation is, over all its processes."""

from collections.abc import Callable
from time import monotonic
from types import TracebackType

from tqdm import tqdm

Report = Callable[[int, int], None]
"""Told by how much the reading and the tokens have grown: (read, tokens)."""


class ProgressBar:
    """A bar of what has been read, with tokens per second and the time left; silent where nobody watches."""

    def __init__(self, description: str, *, total: int | None, unit: str) -> None:
        self.bar = tqdm(total=total, desc=description, unit=unit, unit_scale=True, disable=None, smoothing=0.05)
        self.tokens, self.started = 0, monotonic()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.bar.close()

    def report(self, read: int, tokens: int) -> None:
        """Moves the bar on."""
        self.tokens += tokens
        rate = self.tokens / max(monotonic() - self.started, 1e-9)
        self.bar.set_postfix_str(f"{self.tokens / 1e6:,.1f}M tokens, {rate / 1e3:,.0f}k tokens/s", refresh=False)
        self.bar.update(read)
