"""Comparisons of numbers that may be symbols of a graph that is compiled."""


def truth(condition: bool) -> bool:
    """Its value, a constant there too: of a symbol `not` makes one until torch 2.13, and `bool` makes none."""
    return any([condition])
