"""Checkpoints are read whole: what is damaged, lacks a tensor or holds another is refused, not filled at random."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from json import JSONDecodeError
from logging import LogRecord
from os import PathLike
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

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
    """Calls `from_pretrained` and refuses what transformers only reports: it would go on with random weights.

    A head of its own in a file whose config says that head and embedding are one is kept, as transformers keeps it,
    and the config of the model says so from then on.

    Args:
        from_pretrained: that of a model class.
        name_or_path: its first argument; further ones follow.
        source: what an error calls the checkpoint, where that is not `name_or_path`.
        heads: names of parts that may be missing, or be there for another task; transformers reports those.

    Returns:
        The model and transformers' report on its loading.

    Raises:
        ValueError: in one line, naming the tensor, and for files that are damaged.
    """
    takes_other_shapes = kwargs.pop("ignore_mismatched_sizes", False)
    source = source or name_or_path or "the state dict"
    try:
        with nullcontext() if heads else _report_left_out():
            model, loading = from_pretrained(
                name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except (SafetensorError, UnpicklingError, EOFError, JSONDecodeError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"{source} is damaged ({reason or 'a file ends early'}); get its files again.") from error
    except StrictDataclassError as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}; mend its config.json.") from error
    if name_or_path is None and not kwargs.get("state_dict"):
        return model, loading  # no checkpoint: whoever gives an empty one asks for random weights
    _refuse_other_tensors(model, loading, source, heads)
    if loading["mismatched_keys"] and not takes_other_shapes:
        name, found, needed = min(loading["mismatched_keys"])
        raise ValueError(
            f"{source} holds {name} of the shape {tuple(found)}, and by its config it has {tuple(needed)}; use the "
            "config.json and the weights of one model."
        )
    _untie_config(model)
    return model, loading


def _refuse_other_tensors(
    model: PreTrainedModel, loading: dict[str, Any], source: str | PathLike | None, heads: tuple[str, ...]
) -> None:
    kind = f"a {model.config.model_type} model"
    for name in sorted(loading["unexpected_keys"]):
        if not name.startswith(heads) and not OLD_BUFFERS.search(name):
            raise ValueError(f"{source} holds {name}, which {kind} has no place for; load it by its own class.")
    for name in sorted(loading["missing_keys"]):
        if not name.startswith(heads):
            raise ValueError(f"{source} lacks {name}, which {kind} needs; use a complete checkpoint.")


def _untie_config(model: PreTrainedModel) -> None:
    """Lets the config say it where transformers kept a head that differs from the embedding."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not table.weight:
        model.config.tie_word_embeddings = False


@contextmanager
def _report_left_out() -> Iterator[None]:
    """Keeps transformers' table of missing and other tensors out of the log: an error of one line follows."""
    logger = logging.get_logger("transformers.modeling_utils")

    def is_something_else(record: LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_something_else)
    try:
        yield
    finally:
        logger.removeFilter(is_something_else)


__all__ = ["load_strictly"]
