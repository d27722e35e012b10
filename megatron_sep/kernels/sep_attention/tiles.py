"""Tile settings of the fused kernel: fixed, so that nothing is tuned at run time. ``tools/tune_attention.py`` makes them.

A setting is looked up by the GPU, the head size (padded to a power of two), a length class and a window class.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """How one kernel cuts its work."""

    queries: int
    """Rows of queries in a block; packed heads of one group count as rows."""
    keys: int
    warps: int
    stages: int
    max_registers: int | None = None
    """Registers a thread may use; fewer let more blocks share a multiprocessor, too few spill."""
    descriptors: bool = True
    """Load tiles through tensor-memory descriptors (Hopper and later) instead of pointers."""


class Tiles(NamedTuple):
    """The settings of the three kernels."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile


LENGTHS = {"short": 4096, "medium": 16384, "long": 1 << 62}
"""Length classes by the longest sequence in each."""
WINDOWS = {"narrow": 192, "wide": 1 << 62}
"""Window classes by the widest window in each."""

# Made by tools/tune_attention.py: GPU, padded head size, length class, window class.
TABLE: dict[tuple[str, int, str, str], Tiles] = {}

FALLBACK = {
    32: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    64: Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(64, 32, 4, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 3)),
    256: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 64, 8, 1)),
}
SINGLE_PRECISION = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
"""fp32 multiplies on the ordinary units, exact to fp32: small tiles."""


def choose_tiles(gpu: str, head_size: int, length: int, window: int, bytes_an_element: int) -> Tiles:
    """The settings for a shape; an unknown GPU takes the nearest relative in the table, then the fallback."""
    if bytes_an_element == 4:
        return SINGLE_PRECISION
    key = (head_size, class_of(length, LENGTHS), class_of(window, WINDOWS))
    found = TABLE.get((gpu, *key)) or TABLE.get(("NVIDIA H200", *key))
    return found or FALLBACK[head_size]


def class_of(value: int, classes: dict[str, int]) -> str:
    """The first class whose bound holds ``value``."""
    return next(name for name, bound in classes.items() if value <= bound)
