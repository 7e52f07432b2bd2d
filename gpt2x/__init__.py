"""gpt2x: every checkpoint is at once an exactly resumable state and a stock Hugging Face model."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Of gpt2x.stock_forms, which is loaded with torch and transformers when one of them is asked for.
__all__ = [
    "from_nanogpt",
    "from_stock_config",
    "from_stock_state_dict",
    "save_stock",
    "stock_model_type",
    "to_stock_config",
    "to_stock_state_dict",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("gpt2x.stock_forms"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
