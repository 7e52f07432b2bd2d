"""Checks that several sections share."""


def check_positive(prefix: str, **values: float | None) -> None:
    """Raises ValueError for the first value that is neither None nor above zero."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{prefix}{name} ({value}) must be positive.")
