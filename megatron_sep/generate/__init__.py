"""Inference: caches that keep what their rules keep, and text from models that use them."""
