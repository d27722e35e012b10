"""Foreign files, mutated: every reader ends in a right result or in one message."""
