"""Checkpoints are read whole: what is damaged, lacks a tensor or holds another is refused, not filled at random."""

import re
from collections.abc import Callable
from json import JSONDecodeError
from logging import LogRecord
from os import PathLike
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.utils import logging

# What gpt2x.stock_forms converts.
STOCK_TYPES = ("gpt2", "llama", "qwen3", "nanochat")
# Arguments of from_pretrained that say where a checkpoint lies.
HUB_KWARGS = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    *("use_safetensors", "variant", "weights_only"),
)
# Buffers that older versions of transformers saved, and that every model computes by itself.
OLD_BUFFERS = re.compile(r"attn\.(masked_)?bias|rotary_emb\.inv_freq")


def is_stock(name_or_path: str | PathLike, **hub_kwargs: Any) -> bool:
    """Whether a checkpoint is of a stock form, and not of gpt2x's own; raises ValueError where it is of neither."""
    config, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub_kwargs)
    if config.get("model_type") == "gpt2x":
        return False
    check_model_type(config.get("model_type"))
    return True


def check_model_type(model_type: str | None) -> None:
    """Raises a ValueError unless `model_type` is one of the stock forms."""
    if model_type not in STOCK_TYPES:
        raise ValueError(
            f"model_type ({model_type!r}) must be gpt2x or one of {', '.join(STOCK_TYPES)}, which GPT2X converts; "
            "load other models with AutoModelForCausalLM."
        )


def load_strictly(
    from_pretrained: Callable[..., Any],
    name_or_path: str | PathLike | None,
    *args: Any,
    source: str | PathLike | None = None,
    heads: tuple[str, ...] = (),
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Calls `from_pretrained` of a model class and refuses what transformers only reports before it goes on at random.

    A head of its own in a file whose config says that head and embedding are one is kept, as transformers keeps it,
    and the config of the model says so from then on.

    Args:
        from_pretrained: of a model class; `name_or_path` and further arguments are its own.
        source: what an error calls the checkpoint, where that is not `name_or_path`.
        heads: names of parts that may be missing, or be there for another task; transformers reports those.

    Returns:
        The model and transformers' report on its loading.

    Raises:
        ValueError: in one line, naming the tensor, and for files that are damaged.
    """
    takes_other_shapes = kwargs.pop("ignore_mismatched_sizes", False)
    source = source or name_or_path or "the state dict"
    logger = logging.get_logger("transformers.modeling_utils")
    if not heads:
        logger.addFilter(_is_no_report)
    try:
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, loading = from_pretrained(name_or_path, *args, **kwargs)
    except (SafetensorError, UnpicklingError, EOFError, JSONDecodeError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"{source} is damaged ({reason or 'a file ends early'}); get its files again.") from error
    except StrictDataclassError as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}; mend its config.json.") from error
    finally:
        logger.removeFilter(_is_no_report)
    if name_or_path is None and not kwargs.get("state_dict"):
        return model, loading  # no checkpoint: whoever gives an empty one asks for random weights
    kind = f"a {model.config.model_type} model"
    for name in sorted(loading["unexpected_keys"]):
        if not name.startswith(heads) and not OLD_BUFFERS.search(name):
            raise ValueError(f"{source} holds {name}, which {kind} has no place for; load it by its own class.")
    for name in sorted(loading["missing_keys"]):
        if not name.startswith(heads):
            raise ValueError(f"{source} lacks {name}, which {kind} needs; use a complete checkpoint.")
    if loading["mismatched_keys"] and not takes_other_shapes:
        name, found, needed = min(loading["mismatched_keys"])
        raise ValueError(
            f"{source} holds {name} of the shape {tuple(found)}, and by its config it has {tuple(needed)}; use the "
            "config.json and the weights of one model."
        )
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not table.weight:
        model.config.tie_word_embeddings = False
    return model, loading


def _is_no_report(record: LogRecord) -> bool:
    """Keeps transformers' table of missing and other tensors out of the log: an error of one line follows."""
    return "LOAD REPORT" not in record.getMessage()
