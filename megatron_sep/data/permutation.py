"""A shuffle of [0, n) that needs no memory: position i is computed, so resuming a run is knowing one number."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class Permutation:
    """A permutation of [0, size) keyed by (seed, epoch): a Feistel network over the digits of i in mixed base.

    With ``size <= a b``, i = left b + right; each round adds a hash of one digit to the other, modulo its base, which
    can be undone and therefore never maps two numbers to one. What falls outside [0, size) goes around again.
    """

    size: int
    seed: int
    epoch: int = 0
    _keys: npt.NDArray[np.uint64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(f"{self.seed}:{self.epoch}:{self.size}".encode(), digest_size=8 * _ROUNDS).digest()
        object.__setattr__(self, "_keys", np.frombuffer(digest, "<u8"))

    def __call__(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where each index goes; indices lie in [0, size)."""
        size = np.uint64(self.size)
        moved = self._network(index.astype(np.uint64))
        while (outside := moved >= size).any():
            moved[outside] = self._network(moved[outside])
        return moved.astype(np.int64)

    def _network(self, index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        bases = _bases(self.size)
        digits = [index // bases[1], index % bases[1]]
        for number, key in enumerate(self._keys):
            this, other = number % 2, 1 - number % 2
            digits[this] = (digits[this] + _hash(digits[other], key)) % bases[this]
        return digits[0] * bases[1] + digits[1]


def _bases(size: int) -> tuple[np.uint64, np.uint64]:
    """The two bases, near the square root of ``size``; at least 4 so that a few samples get shuffled too."""
    left = max(4, int(np.ceil(np.sqrt(size))))
    return np.uint64(left), np.uint64(max(4, -(-size // left)))


def _hash(value: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64, on the value with the key added."""
    mixed = value + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
    return mixed ^ (mixed >> np.uint64(31))
