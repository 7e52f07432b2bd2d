"""LoRA (arXiv:2106.09685) by peft on the stock class: what is trained and kept beside a model that stays as it is.

The base is the stock directory or Hub id itself, so whoever has that loads the adapters without gpt2x::

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters)

The stock classes take the batches of the training loop as they are: with ``use_cache=False`` and no attention mask
they keep packed documents apart by their ``position_ids``.
"""

from gpt2x.adapters.files import load_adapters, merged_weights, save_adapters, save_merged, whole_model
from gpt2x.adapters.lora import adapter_weights, add_adapters, load_base

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
