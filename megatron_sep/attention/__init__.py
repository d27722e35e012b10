"""What a token may see: the rule of Sep-Attention, its layers and its separators."""
