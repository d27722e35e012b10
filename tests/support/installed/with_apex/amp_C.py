"""The compiled part of apex's optimizers."""
