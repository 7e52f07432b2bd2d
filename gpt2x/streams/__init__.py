"""Streams of documents to token shards in a bounded cache: the ledger, the filler process and who starts it."""
