"""Text, or other projects' tokens, to token shards: the plan, its tasks, the processes that work on them."""
