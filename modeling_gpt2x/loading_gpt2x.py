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
from transformers.utils import logging

# Arguments of from_pretrained that say where a checkpoint lies.
HUB_KWARGS = {
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    *("use_safetensors", "variant", "weights_only"),
}
# Buffers that older versions of transformers saved, and that every model computes by itself.
OLD_BUFFERS = re.compile(r"attn\.(masked_)?bias|rotary_emb\.inv_freq")


def load_strictly(
    from_pretrained: Callable[..., Any],
    name_or_path: str | PathLike | None,
    *args: Any,
    source: str | PathLike | None = None,
    heads: tuple[str, ...] = (),
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Calls `from_pretrained` of a model class and refuses what transformers only reports; returns model and report.

    A head that differs from the embedding is kept, as transformers keeps it, and the model's config then says so.

    Args:
        from_pretrained: of a model class; `name_or_path` and further arguments are its own.
        source: what an error calls the checkpoint, where that is not `name_or_path`.
        heads: names of parts that may be missing, or be there for another task; transformers reports those.

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
        shapes = f"of the shape {tuple(found)}, and by its config it has {tuple(needed)}"
        raise ValueError(f"{source} holds {name} {shapes}; use the config.json and the weights of one model.")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not table.weight:
        model.config.tie_word_embeddings = False
    return model, loading


def _is_no_report(record: LogRecord) -> bool:
    """Keeps transformers' table of missing and other tensors out of the log: an error of one line follows."""
    return "LOAD REPORT" not in record.getMessage()
