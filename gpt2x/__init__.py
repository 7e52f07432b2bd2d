"""gpt2x: every checkpoint is at once an exactly resumable state and a stock Hugging Face model."""

__version__ = "0.1.0"
