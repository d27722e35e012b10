"""The compiled part of apex's norms."""
