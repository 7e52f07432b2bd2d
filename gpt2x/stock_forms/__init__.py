"""The stock forms of GPT2X models: read, converted both ways without loss, and written.

GPT2X is an implementation, not a format. A model whose options some class of transformers shares is saved in the form
of that class, and everything that reads transformers checkpoints reads it.
"""

from gpt2x.stock_forms.conversion import (
    from_stock_config,
    from_stock_state_dict,
    stock_model_type,
    to_stock_config,
    to_stock_state_dict,
)
from gpt2x.stock_forms.nanogpt import from_nanogpt
from gpt2x.stock_forms.pretrained import load_stock, save_config, save_stock

__all__ = [
    "from_nanogpt",
    "from_stock_config",
    "from_stock_state_dict",
    "load_stock",
    "save_config",
    "save_stock",
    "stock_model_type",
    "to_stock_config",
    "to_stock_state_dict",
]
