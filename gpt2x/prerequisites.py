"""What a command needs, asked before torch and transformers are imported, which takes seconds."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2x.commands import install, install_extra
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, read_json
from gpt2x.locate import base_of, find_model, holds_tokenizer

# What the extras of setup.cfg are for, by the names that are imported.
_EXTRAS = {
    "eval": ("lm_eval",),
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "peft": ("peft",),
}
_WEIGHTS = ("*.safetensors", "*.bin")
TRACKERS = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Those that accelerate knows, and of what each needs one; it would leave out silently what is not installed."""

ADAPTABLE_TYPES = ("gpt2", "llama", "qwen3", "nanochat")
"""The stock forms, for each of which the tests show that packed documents do not see each other."""


def check_installed(extra: str, *, what: str) -> None:
    """Raises UserError where a library of an extra is not installed, which `what` needs."""
    missing = [name for name in _EXTRAS[extra] if not _is_installed(name)]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}, which is not installed; run `{install_extra(extra)}`.")


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker of run.report_to that accelerate does not know, or that is not installed."""
    for name in names:
        if name not in (*TRACKERS, "all"):
            raise UserError(f"run.report_to ({name}) must be one of {', '.join(TRACKERS)}, or all; correct it.")
        if name != "all" and not any(map(_is_installed, TRACKERS[name])):
            raise UserError(f"run.report_to ({name}) is not installed; run `{install(name)}`, or leave it out.")


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check_model(name: str) -> str:
    """The directory of the model that a name means, or its Hub id, with what reading it needs: weights, a tokenizer,
    and of adapters their base and peft.

    Raises:
        UserError: where something is not there.
    """
    found = find_model(name)
    if Path(found).is_dir():
        if (Path(found) / "adapter_config.json").is_file():
            check_installed("peft", what=f"{found} holds adapters, and reading them")
            base_of(Path(found))
        if not any(any(Path(found).glob(pattern)) for pattern in _WEIGHTS):
            raise UserError(f"{found} holds no weights (model.safetensors); copy the whole model, or train it again.")
        if not holds_tokenizer(Path(found)):
            raise UserError(f"{found} holds no tokenizer; copy the model's own there, or give another model.")
    return found


def refuse_adapters(origin: str) -> None:
    """Raises UserError where a directory to start from holds adapters."""
    if (Path(origin) / "adapter_config.json").is_file():
        raise UserError(
            f"init_from ({origin}) holds adapters, not a model; make it one by lora.merge true in the run they are of."
        )


def check_adaptable(origin: str, model_type: str) -> None:
    """Raises UserError for a type of models that adapters are not trained beside."""
    if model_type not in ADAPTABLE_TYPES:
        raise UserError(
            f"init_from ({origin}) is of the type {model_type}, and adapters are for the stock forms "
            f"{', '.join(ADAPTABLE_TYPES)}; give one of these, or leave lora out to train all weights."
        )


def model_type_of(directory: Path) -> str:
    """That of a model, or of the model that adapters belong to.

    Raises:
        UserError: where its config is damaged, or there is no base.
    """
    while (directory / "adapter_config.json").is_file():
        directory = Path(base_of(directory))
    try:
        return str(read_json(directory / "config.json", dict[str, Any]).get("model_type"))
    except DamagedError as error:
        raise UserError(f"{error}; restore it, or give another model.") from error


def check_chat_template(directory: str, *, name: str) -> None:
    """Raises UserError where a model's directory has no chat template in any of the places that transformers knows.

    Args:
        directory: the model's, or its Hub id, of which nothing is known yet.
        name: what the user calls it.
    """
    place = Path(directory)
    if not place.is_dir() or any(place.glob("*chat_template*")):
        return
    try:
        settings = read_json(place / "tokenizer_config.json", dict[str, Any])
    except DamagedError:
        settings = {}  # whoever loads the tokenizer says what is wrong
    if not settings.get("chat_template"):
        raise no_chat_template(name)


def no_chat_template(name: str) -> UserError:
    """The complaint about a model that is to chat and cannot."""
    return UserError(f"{name} has no chat template; fine-tune it by scripts/finetune.py, or leave --chat out.")
