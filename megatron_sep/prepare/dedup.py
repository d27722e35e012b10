"""Exact and near duplicates: which documents repeat one that stands before them.

Near duplicates are found by MinHash signatures (Broder 1997) and locality-sensitive hashing: documents whose signatures
agree in a whole band are compared by the share of values that agree, which estimates the Jaccard similarity of their
shingles. A document is dropped where that reaches the threshold for one that is kept, so a chain of small changes
does not drop its far end.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_sep.data.extras import needs_extra
from megatron_sep.prepare.shingles import Hashes

Signatures = npt.NDArray[np.uint32]
"""[documents, permutations]"""
_SEED = 1


def text_digest(text: str) -> bytes:
    """16 bytes that stand for the text in exact deduplication."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def signatures(shingles: Sequence[Hashes], permutations: int) -> Signatures:
    """The MinHash signature of each set of shingle hashes."""
    with needs_extra("rensa", "data"):
        from rensa import RMinHash
    if not shingles:
        return np.empty((0, permutations), np.uint32)
    offsets = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    flat = np.concatenate(shingles)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, permutations, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(shingles), permutations)


def exact_duplicates(digests: npt.NDArray[np.void], alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """For each document the first one of the same digest before it, or -1; only documents ``alive`` take part."""
    original = np.full(len(digests), -1, np.int64)
    numbers = np.flatnonzero(alive)
    _, first, group = np.unique(digests[numbers], return_index=True, return_inverse=True)
    repeated = first[group] != np.arange(len(numbers))
    original[numbers[repeated]] = numbers[first[group[repeated]]]
    return original


def near_duplicates(
    signature: Signatures, alive: npt.NDArray[np.bool_], threshold: float, rows: int
) -> npt.NDArray[np.int64]:
    """For each document a kept one before it that is as similar as ``threshold``, or -1; only ``alive`` take part.

    An estimate that is below the threshold by no more than its standard error counts: at the threshold itself five of
    six pairs are found, where half would be.
    """
    enough = threshold - (threshold * (1 - threshold) / signature.shape[1]) ** 0.5
    original = np.full(len(signature), -1, np.int64)
    kept: dict[int, list[int]] = {}
    for document, buckets in _shared_buckets(signature, np.flatnonzero(alive), rows):
        near = sorted({other for bucket in buckets for other in kept.get(bucket, ())})
        similar = (signature[near] == signature[document]).mean(1) >= enough if near else np.empty(0, bool)
        if similar.any():
            original[document] = near[int(similar.argmax())]
        else:
            for bucket in buckets:
                kept.setdefault(bucket, []).append(document)
    return original


def _shared_buckets(
    signature: Signatures, numbers: npt.NDArray[np.int64], rows: int
) -> Iterator[tuple[int, list[int]]]:
    """Each document that shares a band with another, in order, and the numbers of the buckets it shares.

    Memory: 16 bytes a document for one band at a time, and what is shared.
    """
    members: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    buckets: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    count = 0
    for start in range(0, signature.shape[1] - rows + 1, rows):
        _, group, size = np.unique(_band_keys(signature, numbers, start, rows), return_inverse=True, return_counts=True)
        shared = size[group] > 1
        members.append(numbers[shared])
        buckets.append(group[shared] + count)
        count += len(size)
    member, bucket = np.concatenate(members), np.concatenate(buckets)
    order = np.argsort(member, kind="stable")
    member, bucket = member[order], bucket[order]
    bounds = np.append(np.flatnonzero(np.diff(member, prepend=-1)), len(member)).tolist()
    for start, end in pairwise(bounds):
        yield int(member[start]), bucket[start:end].tolist()


def _band_keys(signature: Signatures, numbers: npt.NDArray[np.int64], start: int, rows: int) -> Hashes:
    """One number for the values of a band, of each document, through steps of 65,536 documents."""
    keys = np.empty(len(numbers), np.uint64)
    for at in range(0, len(numbers), 1 << 16):
        band = signature[numbers[at : at + (1 << 16)], start : start + rows].astype(np.uint64)
        key = np.zeros(len(band), np.uint64)
        for column in band.T:
            key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        keys[at : at + (1 << 16)] = key
    return keys
