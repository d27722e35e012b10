"""A document as the set of its runs of words, hashed; what near-duplicates and contamination are found by."""

import re

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15
_MODULUS = 1 << 64
_GAPS = re.compile(r"[\W_]+")


def runs(text: str, words: int) -> Hashes:
    """The hash of each run of ``words`` words, in order, uint64; of a shorter text: of all of it.

    Words are what ASCII white space separates. A run's hash is of its bytes, each white space taken as one blank
    each: sum of byte_i * base^i modulo 2^64, from prefix sums, so that it costs the same whatever the length.
    """
    data = np.frombuffer(f" {' '.join(text.split())} ".encode(), np.uint8)
    gaps = np.flatnonzero(data == 0x20)
    count = max(len(gaps) - words, 1)
    starts, ends = gaps[:count] + 1, gaps[min(words, len(gaps) - 1) :][:count]
    powers, inverses = _powers(len(data))
    sums = np.concatenate([np.zeros(1, np.uint64), (data * powers).cumsum(dtype=np.uint64)])
    return _mix((sums[ends] - sums[starts]) * inverses[starts])


def run_text(text: str, words: int, number: int) -> str:
    """The words of run ``number``."""
    return " ".join(text.split()[number : number + words])


def plain_words(text: str) -> str:
    """Lower case, letters and digits alone: what contamination is looked for in."""
    return _GAPS.sub(" ", text.lower())


_TABLES: list[Hashes] = [np.ones(1, np.uint64), np.ones(1, np.uint64)]


def _powers(size: int) -> tuple[Hashes, Hashes]:
    """base^i and base^-i modulo 2^64 for i below ``size``, kept from call to call."""
    if len(_TABLES[0]) < size:
        length = max(size, 2 * len(_TABLES[0]))
        for number, base in enumerate((_BASE, pow(_BASE, -1, _MODULUS))):
            table = np.full(length, base, np.uint64)
            table[0] = 1
            _TABLES[number] = np.multiply.accumulate(table, dtype=np.uint64)
    return _TABLES[0][:size], _TABLES[1][:size]


def _mix(value: Hashes) -> Hashes:
    """The finaliser of splitmix64: near runs get hashes far apart."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
