"""How a kernel that passes over rows once is launched."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Sizes of blocks and grid; results are the same for all but the order of sums."""

    rows: int
    """Of a block."""
    warps: int
    programs: int = 0
    """To a multiprocessor, where each loops over many blocks."""
    stages: int = 1
    """Blocks on their way from memory at once, where a program loops over blocks."""
    columns: int = 0
    """Of a block, where it does not hold whole rows."""
