"""Exact and near duplicates: which documents repeat one that stands before them.

Near duplicates are found by MinHash signatures (Broder 1997) and locality-sensitive hashing: documents whose signatures
agree in a whole band are compared by the share of values that agree, which estimates the Jaccard similarity of their
shingles. A document is dropped where that reaches the threshold for one that is kept, so a chain of small changes
does not drop its far end.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_sep.data.extras import needs_extra
from megatron_sep.prepare.buckets import MEMBER, ROW_BYTES, Documents
from megatron_sep.prepare.rows import JoinedRows
from megatron_sep.prepare.shingles import Hashes

Signatures = npt.NDArray[np.uint8]
"""[documents, permutations]: the last byte of each value, as in b-bit minwise hashing (Li and Koenig 2010)."""
Numbers = npt.NDArray[np.int64]
COMPARED = 64
"""Kept documents of a band that one is compared with, so that a band which a million share costs what others do."""
_FEW = 1024
_SEED = 1


def text_digest(text: str) -> bytes:
    """16 bytes that stand for the text in exact deduplication."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def signatures(shingles: Sequence[Hashes], permutations: int) -> Signatures:
    """The MinHash signature of each set of shingle hashes."""
    with needs_extra("rensa", "data"):
        from rensa import RMinHash
    if not shingles:
        return np.empty((0, permutations), np.uint8)
    offsets = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    flat = np.concatenate(shingles)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, permutations, _SEED)
    return np.array(matrix.to_rows(), np.uint32).astype(np.uint8).reshape(len(shingles), permutations)


def repeats(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Of rows [documents, 2] in order: which are equal to one before them."""
    _, first = np.unique(np.ascontiguousarray(digests).view("V16")[:, 0], return_index=True)
    repeated = np.ones(len(digests), bool)
    repeated[first] = False
    return repeated


def band_keys(signature: Signatures, rows: int) -> Hashes:
    """[bands, documents]: a number for the ``rows`` values of each band of each document."""
    keys = np.zeros((signature.shape[1] // rows, len(signature)), np.uint64)
    for number, values in enumerate(np.ascontiguousarray(signature.T)[: len(keys) * rows]):
        key = keys[number // rows]
        key ^= values
        key *= np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return keys * np.uint64(0x9E3779B97F4A7C15)


def resolve(files: Sequence[Path], signatures: JoinedRows, threshold: float, memory: int) -> Iterator[tuple[int, int]]:
    """Each document that is as similar as ``threshold`` to a kept one before it, and that one, in order.

    Of documents that share a band, as ``files`` list them; each is compared with the first ``COMPARED`` of a band that
    are kept. Which those are is written to files beside them. An estimate that is below the threshold by no more than
    its standard error counts: at the threshold itself five of six pairs are found, where half would be.
    """
    found = [np.asarray(np.memmap(file, MEMBER, "r")) for file in files if file.stat().st_size]
    if not found:
        return
    first = np.cumsum([0, *map(len, found)])
    kept, count = (
        np.asarray(np.memmap(files[0].with_name(name), kind, "w+", shape=(int(first[-1]),)))
        for name, kind in (("kept", np.uint32), ("count", np.uint8))
    )
    enough = enough_equal(threshold, signatures.width)
    for document, groups in _in_order(found, first, len(signatures), memory):
        counts = count[groups]
        others = _kept_of(groups, counts, kept)
        if len(others):
            equal = (signatures.take(others) == signatures.take(np.array([document]))).sum(1)
            if (equal >= enough).any():
                yield document, int(others[equal.argmax()])
                continue
        room = counts < COMPARED
        kept[groups[room] + counts[room]] = document
        count[groups[room]] = counts[room] + 1


def _kept_of(groups: Numbers, counts: Signatures, kept: Documents) -> Numbers:
    """The documents that stand in some groups, each once."""
    begun = counts > 0
    starts, lengths = groups[begun].tolist(), counts[begun].tolist()
    return np.array(sorted({n for g, c in zip(starts, lengths, strict=True) for n in kept[g : g + c].tolist()}), int)


def enough_equal(threshold: float, permutations: int) -> float:
    """Equal values from which two documents are near duplicates; of unequal ones the last byte agrees once in 256."""
    least: float = threshold - (threshold * (1 - threshold) / permutations) ** 0.5
    return permutations * (least + (1 - least) / 256)


def _in_order(
    found: Sequence[npt.NDArray[np.void]], first: Numbers, documents: int, memory: int
) -> Iterator[tuple[int, Numbers]]:
    """Each document of the files and the places of its groups, through runs of documents whose rows fit in memory."""
    at = [0] * len(found)
    for end in _ends(found, documents, memory):
        members, groups = [], []
        for number, rows in enumerate(found):
            stop = bisect_left(rows["document"], end, at[number])
            members.append(rows["document"][at[number] : stop])
            groups.append(rows["group"][at[number] : stop].astype(np.int64) + first[number])
            at[number] = stop
        member, group = np.concatenate(members), np.concatenate(groups)
        order = np.argsort(member, kind="stable")
        member, group = member[order], group[order]
        bounds = np.append(np.flatnonzero(np.diff(member, prepend=member[:1] - 1)), len(member)).tolist()
        for start, stop in pairwise(bounds):
            yield int(member[start]), group[start:stop]


def _ends(found: Sequence[npt.NDArray[np.void]], documents: int, memory: int) -> Iterator[int]:
    """Numbers of documents up to which the rows since the one before fit in memory, as far as a few documents do."""
    rows = np.zeros(documents // _FEW + 1, np.int64)
    for members in found:
        rows += np.bincount(members["document"] // _FEW, minlength=len(rows))
    waiting = 0
    for number, more in enumerate(rows.tolist()):
        if waiting and (waiting + more) * ROW_BYTES > memory:
            yield number * _FEW
            waiting = 0
        waiting += more
    yield documents
