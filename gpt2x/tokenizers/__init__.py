"""Text to token ids: byte-level BPE, chat templates, special tokens."""
