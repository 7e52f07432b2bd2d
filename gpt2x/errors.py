"""The one exception that means: the user can mend this."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gpt2x.addresses import without_secrets


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, a file, a token.

    Its message is one line that names the value, the rule it broke and the remedy; of an address without its secrets.
    Scripts print it without a traceback and exit with 1; every other exception is a bug of ours and keeps its
    traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


@contextmanager
def exit_on_user_error(*, is_said: Callable[[str], bool] = lambda _line: False) -> Iterator[None]:
    """Turns a UserError of the block into one line on stderr, unless another process has said it, and exit code 1."""
    try:
        yield
    except UserError as error:
        line = f"error: {error}"
        if not is_said(line):
            print(line, file=sys.stderr)
        sys.exit(1)
