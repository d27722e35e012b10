"""Files of rows of equal size, mapped and read as if they were joined."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
STEP = 1 << 14
"""Rows that are looked at at once."""


class JoinedRows:
    """[rows of all files, width], of which nothing is in memory but the pages in use."""

    def __init__(self, paths: Sequence[Path], dtype: Any, width: int) -> None:
        self.width, self._dtype = width, dtype
        self._maps = [map_rows(path, dtype, width) for path in paths]
        self._first = np.cumsum([0, *map(len, self._maps)])

    @property
    def first(self) -> tuple[int, ...]:
        """Number of the first row of each file."""
        return tuple(self._first[:-1].tolist())

    def __len__(self) -> int:
        return int(self._first[-1])

    def steps(self) -> Iterator[tuple[int, Array]]:
        """The number of the first row and the rows of each step, in order."""
        for first, rows in zip(self._first.tolist(), self._maps, strict=False):
            for at in range(0, len(rows), STEP):
                yield first + at, rows[at : at + STEP]

    def take(self, numbers: npt.NDArray[np.int64]) -> Array:
        """A copy of some rows."""
        owners = np.searchsorted(self._first, numbers, side="right") - 1
        places = (numbers - self._first[owners]).tolist()
        found = np.empty((len(numbers), self.width), self._dtype)
        for row, (owner, place) in enumerate(zip(owners.tolist(), places, strict=True)):
            found[row] = self._maps[owner][place]
        return found


def map_rows(path: Path, dtype: Any, width: int) -> Array:
    """[rows, width] of a file, which may be empty."""
    if not path.stat().st_size:
        return np.empty((0, width), dtype)
    return np.asarray(np.memmap(path, dtype, "r")).reshape(-1, width)
