"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, a file, a token.

    Its message is one line that names the value, the rule it broke and the remedy. Scripts print it without a
    traceback and exit with 1; every other exception is a bug of ours and keeps its traceback.
    """
