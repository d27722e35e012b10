"""Weights on disk and by name: what a checkpoint holds and says of itself. No megatron-core, no process groups."""
