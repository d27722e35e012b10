"""What every reader of weights on disk offers: names and shapes without loading anything, one tensor at a time."""

import struct
from collections.abc import Mapping
from pickle import PickleError
from typing import Protocol

from torch import Tensor

from megatron_sep.errors import UserError

Shape = tuple[int, ...]
UNREADABLE = (
    *(PickleError, struct.error, EOFError, OSError, MemoryError, ImportError),
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError),
)
"""What libraries raise for a file that is damaged."""


class WeightsError(UserError):
    """Weights that are damaged, or do not fit the model they are said to be."""


class Files(Protocol):
    """Named tensors on disk."""

    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every tensor, by name."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU. Raises WeightsError."""
        ...
