"""Token shards to batches: sources, the global order, training and validation batches."""
