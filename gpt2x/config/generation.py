"""What scripts/generate.py is told; imports neither torch nor transformers."""

from dataclasses import dataclass
from typing import Literal

from gpt2x.config.checks import check_positive


@dataclass(frozen=True, kw_only=True)
class GenerationRecipe:
    """Continues text or chats: what scripts/generate.py runs. Without a prompt it asks for one after another."""

    model: str = "runs/quickstart"
    """Directory or Hub id of a model, or the directory of a run."""
    prompt: str | None = None
    """The text to continue; null to ask for prompts until end of input."""
    chat: bool = False
    """Whether the prompts are turns of a conversation, which the model answers by its chat template, or texts to
    continue."""
    system: str | None = None
    """The system turn a conversation begins with."""
    max_new_tokens: int = 200
    """Length of a continuation or an answer in tokens; end of text ends it earlier."""
    temperature: float = 0.8
    """Flattens (above 1) or sharpens (below 1) the distribution; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens are drawn."""
    top_p: float | None = 0.95
    """Only the likeliest tokens that together have this probability are drawn (arXiv:1904.09751)."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already there become less likely (arXiv:1909.05858)."""
    seed: int = 1337
    """The same seed draws the same text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and arithmetic."""

    def __post_init__(self) -> None:
        check_positive("", max_new_tokens=self.max_new_tokens, top_k=self.top_k, top_p=self.top_p)
        check_positive("", repetition_penalty=self.repetition_penalty)
        if self.system is not None and not self.chat:
            raise ValueError("system is the first turn of a conversation; give chat true with it, or leave it out.")
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must not be negative; 0 takes the likeliest token.")
