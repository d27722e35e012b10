"""Text into tokens, tokens into shards, shards into batches."""
