"""Tile settings of the fused kernel: fixed, nothing is tuned at run time. ``tools/tune_attention.py`` makes them.

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
TABLE: dict[tuple[str, int, str, str], Tiles] = {
    ("NVIDIA H200", 64, "short", "narrow"): Tiles(
        Tile(64, 64, 4, 2, 96), Tile(64, 64, 4, 2, 128), Tile(32, 64, 4, 3, 128)
    ),
    ("NVIDIA H200", 64, "medium", "narrow"): Tiles(
        Tile(64, 64, 4, 2, 96), Tile(64, 64, 4, 2, 128), Tile(64, 64, 4, 3, 168)
    ),
    ("NVIDIA H200", 128, "short", "narrow"): Tiles(Tile(64, 32, 4, 3), Tile(64, 32, 4, 2, 168), Tile(64, 64, 4, 2)),
    ("NVIDIA H200", 128, "medium", "wide"): Tiles(Tile(64, 32, 4, 3, 168), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    ("NVIDIA H200", 128, "long", "wide"): Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
    ("NVIDIA H200", 256, "short", "narrow"): Tiles(Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
}

FALLBACK = {
    32: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    64: Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(64, 32, 4, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 3)),
    256: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 64, 8, 1)),
}
SINGLE_PRECISION = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
"""fp32 multiplies on the ordinary units, exact to fp32: small tiles."""


def choose_tiles(gpu: str, head_size: int, length: int, window: int, bytes_an_element: int) -> Tiles:
    """The settings for a shape; what the table lacks takes the nearest row of the same head size, then the fallback."""
    if bytes_an_element == 4:
        return SINGLE_PRECISION
    wanted = (gpu, class_of(length, LENGTHS), class_of(window, WINDOWS))

    def likeness(key: tuple[str, int, str, str]) -> tuple[bool, bool, bool]:
        return key[2] == wanted[1], key[0] == wanted[0], key[3] == wanted[2]

    rows = [key for key in TABLE if key[1] == head_size]
    return TABLE[max(rows, key=likeness)] if rows else FALLBACK[head_size]


def class_of(value: int, classes: dict[str, int]) -> str:
    """The first class whose bound holds ``value``."""
    return next(name for name, bound in classes.items() if value <= bound)
