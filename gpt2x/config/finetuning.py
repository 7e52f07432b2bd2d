"""What fine-tuning adds: conversations as data, low-rank adapters."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from gpt2x.config.checks import Range, ShareBelowOne, Size, check_numbers


@dataclass(frozen=True, kw_only=True)
class ChatSection:
    """Conversations in place of documents: how they are written out, and what of them is learned."""

    template: Path | None = None
    """The chat template, a Jinja file with {% generation %} around what the assistant says; null for the
    tokenizer's own."""
    special_tokens: list[str] = field(default_factory=list)
    """Tokens that the template writes and the tokenizer lacks; they are added to it."""
    end_of_turn: str | None = None
    """The token that ends what the assistant says. It becomes the tokenizer's end of text, at which whatever reads
    the model stops; null for the tokenizer's own."""
    learn: Literal["assistant", "all"] = "assistant"
    """Whether what the assistant says is learned, with the end of its turn, or the whole conversation."""
    max_length: Size | None = None
    """Conversations are cut to so many tokens at their end; with packing whole_documents at most data.sequence_length
    of the run."""
    drop_unlearned: bool = False
    """Whether conversations without anything to learn, which may be for the cut, are left out and counted, or end
    the preparation."""

    def __post_init__(self) -> None:
        check_numbers(self, "chat.")


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """Low-rank adapters beside the frozen weights of the stock model."""

    rank: Annotated[int, Range(least=1, most=10**5)] = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Range(above=0, most=10**6)] = 32.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: ShareBelowOne = 0.0
    """Dropout before the adapters."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the linear layers that get one, or all-linear; by default peft's choice for the architecture, or else
    all of them."""
    merge: bool = False
    """Whether final/ is the stock model with the adapters added to its weights, or the adapters alone."""

    def __post_init__(self) -> None:
        check_numbers(self, "lora.")
