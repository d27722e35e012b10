"""Checkpoints of other programs in, and out again."""
