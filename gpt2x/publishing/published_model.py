"""What the files of a model say to those who use it: who reads it, how to load it, how to chat with it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypeVar, cast

from typing_extensions import TypedDict

from gpt2x.errors import UserError
from gpt2x.files import DamagedError, read_json
from gpt2x.locate import find_model, is_hub_id

Shape = TypeVar("Shape")
ADAPTER_CONFIG = "adapter_config.json"
_READERS = {
    "gpt2": "transformers, vLLM and PEFT as it is; llama.cpp, ONNX Runtime and transformers.js after an export",
    "llama": "transformers, vLLM, mistral.rs and PEFT as it is; llama.cpp, ONNX Runtime and transformers.js after an "
    "export",
    "qwen3": "transformers, vLLM, mistral.rs and PEFT as it is; llama.cpp, ONNX Runtime and transformers.js after an "
    "export",
    "nanochat": "transformers as it is; ONNX Runtime and transformers.js after an export",
    "gpt2x": "transformers with `trust_remote_code=True`, since its code is in this repository; ONNX Runtime after an "
    "export",
}


class _ModelConfig(TypedDict):
    model_type: str
    architectures: NotRequired[list[str] | None]


class AdapterConfig(TypedDict):
    """What is looked at in PEFT's adapter_config.json."""

    base_model_name_or_path: str


class _Token(TypedDict):
    content: str


class _TokenizerConfig(TypedDict):
    eos_token: NotRequired[str | _Token | None]


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A model, or adapters beside one."""

    config: Mapping[str, Any]
    """config.json; of adapters that of the base, empty where it is not on this machine."""
    adapters: Mapping[str, Any] | None
    """adapter_config.json, PEFT's; None where the weights are whole."""
    is_chat: bool
    """Whether the tokenizer has a chat template."""
    end_of_turn: str | None
    """The tokenizer's end of text."""

    @classmethod
    def of(cls, directory: Path) -> "PublishedModel":
        """Reads the files in a directory of a run or of a model.

        Raises:
            UserError: where there is no model, or one of these files is damaged.
        """
        model_dir = Path(find_model(str(directory)))
        adapters = read_adapter_config(model_dir) if os.path.lexists(model_dir / ADAPTER_CONFIG) else None
        settings_file = model_dir / "tokenizer_config.json"
        settings = _read(settings_file, _TokenizerConfig) if os.path.lexists(settings_file) else {}
        end = settings.get("eos_token")
        return cls(
            config=_base_config(adapters) if adapters else _read(model_dir / "config.json", _ModelConfig),
            adapters=cast(Mapping[str, Any], adapters),
            is_chat=(model_dir / "chat_template.jinja").is_file() or bool(settings.get("chat_template")),
            end_of_turn=end["content"] if isinstance(end, dict) else end,
        )

    @property
    def base(self) -> str | None:
        """Of adapters the id of the model beside which they are read; None where that is a directory."""
        name = self.adapters["base_model_name_or_path"] if self.adapters else None
        return name if name is not None and is_hub_id(name) else None

    def introduction(self) -> str:
        """What it is, and what reads it."""
        if self.adapters is not None:
            base = f"`{self.base}`" if self.base else "a model that is not on the Hub"
            return f"LoRA adapters for {base}, trained by gpt2x. They are read by PEFT."
        model_type = self.config["model_type"]
        model_class = (self.config.get("architectures") or [model_type])[0]
        readers = _READERS.get(model_type, "transformers")
        return f"A causal language model, `{model_class}`, trained by gpt2x. It is read by {readers}."

    def loading(self, repo_id: str) -> str:
        """Code that makes `model` and `tokenizer`."""
        imported = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")'
        if self.adapters is None:
            remote = ", trust_remote_code=True" if self.config["model_type"] == "gpt2x" else ""
            return _python(imported, f'model = AutoModelForCausalLM.from_pretrained("{repo_id}"{remote})', tokenizer)
        code = _python(
            "from peft import PeftModel",
            imported,
            f'base = AutoModelForCausalLM.from_pretrained("{self.base or "BASE"}")',
            f'model = PeftModel.from_pretrained(base, "{repo_id}")',
            tokenizer,
        )
        where = "`BASE` is the directory of the model that the adapters were trained on."
        return code if self.base else f"{code}\n\n{where}"

    def chatting(self) -> str:
        """Code that answers a message, and what ends a turn; nothing where there is no chat template."""
        if not self.is_chat:
            return ""
        code = _python(
            "from transformers import pipeline\n",
            'chat = pipeline("text-generation", model=model, tokenizer=tokenizer)',
            'messages = [{"role": "user", "content": "Hello!"}]',
            'print(chat(messages, max_new_tokens=256)[0]["generated_text"][-1]["content"])',
        )
        end = f"`{self.end_of_turn}` ends a turn. " if self.end_of_turn else ""
        return (
            f"With `model` and `tokenizer` as above:\n\n{code}\n\n{end}transformers' pipelines read the text of a "
            f"special token in a message as that token, so that a user who types it can end a turn or begin another; "
            f"`scripts/generate.py --chat` of gpt2x keeps it text."
        )


def read_adapter_config(directory: Path) -> AdapterConfig:
    """The adapter_config.json of a directory.

    Raises:
        UserError: where it is damaged.
    """
    return _read(directory / ADAPTER_CONFIG, AdapterConfig)


def _base_config(adapters: AdapterConfig) -> Mapping[str, Any]:
    base = Path(adapters["base_model_name_or_path"])
    return _read(Path(find_model(str(base))) / "config.json", _ModelConfig) if base.is_dir() else {}


def _read(file: Path, shape: type[Shape]) -> Shape:
    try:
        return read_json(file, shape)
    except DamagedError as error:
        raise UserError(f"{error}; copy the model again.") from error


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
