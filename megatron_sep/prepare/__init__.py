"""Text into shards: read, deduplicate, decontaminate, tokenise, write, with a receipt."""
