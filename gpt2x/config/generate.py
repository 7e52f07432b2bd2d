"""What scripts/generate.py runs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from gpt2x.config.checks import Range, Seed, Size, check_numbers, shown


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
    max_new_tokens: Size = 200
    """Length of a continuation or an answer in tokens; end of text ends it earlier."""
    temperature: Annotated[float, Range(least=0, most=1000)] = 0.8
    """Flattens (above 1) or sharpens (below 1) the distribution; 0 always takes the likeliest token."""
    top_k: Size | None = None
    """Only the k likeliest tokens are drawn."""
    top_p: Annotated[float, Range(above=0, most=1)] | None = 0.95
    """Only the likeliest tokens that together have this probability are drawn (arXiv:1904.09751)."""
    repetition_penalty: Annotated[float, Range(least=0.01, most=100)] = 1.0
    """Above 1, tokens already there become less likely (arXiv:1909.05858)."""
    seed: Seed = 1337
    """The same seed draws the same text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and arithmetic."""

    def __post_init__(self) -> None:
        check_numbers(self, "")
        if self.system is not None and not self.chat:
            raise ValueError(
                f"system ({shown(self.system)}) is the first turn of a conversation; give --chat with it, or leave it "
                f"out."
            )
        if 0 < self.temperature < 0.001:  # logits would be divided to infinity
            raise ValueError(
                f"temperature ({self.temperature}) must be 0, which takes the likeliest token, or at least 0.001."
            )
