"""Tables and figures of the paper, ours beside theirs; items.py lists them."""
