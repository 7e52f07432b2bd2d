"""Token shards: their files, index, statistics and writer, and the token sets that a data.path may hold."""
