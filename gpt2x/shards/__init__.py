"""Text to token shards: corpora, tokenizers, shard files and their index, preparation."""
