"""Shards, instructions and tokenizers as a run reads them: which tokens are in which step."""
