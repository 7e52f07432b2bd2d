"""LoRA (arXiv:2106.09685) by peft on the stock class: what is trained and kept beside a model that stays as it is.

The base is the stock directory or Hub id itself, so whoever has that loads the adapters without gpt2x::

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters)

The stock classes take the batches of the training loop as they are: with ``use_cache=False`` and no attention mask
they keep packed documents apart by their ``position_ids``.
"""

from gpt2x.adapters.base import load_base
from gpt2x.adapters.files import load_adapters, merged_weights, save_adapters, save_merged
from gpt2x.adapters.layers import adapter_weights, add_adapters
from gpt2x.adapters.merging import whole_model

__all__ = [
    "adapter_weights",
    "add_adapters",
    "load_adapters",
    "load_base",
    "merged_weights",
    "save_adapters",
    "save_merged",
    "whole_model",
]
