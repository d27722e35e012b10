"""Inference: caches that keep what their policies keep, and text from models that use them."""
