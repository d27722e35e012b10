"""Exact and near duplicates: which documents repeat one that stands before them.

Near duplicates are found by MinHash signatures (Broder 1997) and locality-sensitive hashing: documents whose signatures
agree in a whole band are compared by the share of values that agree, which estimates the Jaccard similarity of their
shingles. A document is dropped where that reaches the threshold for one that is kept, so a chain of small changes
does not drop its far end.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_sep.data.extras import needs_extra
from megatron_sep.prepare.rows import STEP, JoinedRows
from megatron_sep.prepare.shingles import Hashes

Signatures = npt.NDArray[np.uint8]
"""[documents, permutations]: the last byte of each value, as in b-bit minwise hashing (Li and Koenig 2010)."""
SHARED = np.dtype([("document", "<u4"), ("group", "<u4")])
KEY_BITS = 40
"""Of a band: of 200 million documents 20,000 pairs agree by chance, and are told apart by their signatures."""
_ROW_BYTES = 64
"""Memory that a row of SHARED takes while it is sorted."""
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


def in_share(key: Hashes, share: int, shares: int) -> npt.NDArray[np.bool_]:
    """Which of some numbers of 40 bits are in a share of all there are; equal ones are in the same."""
    mine: npt.NDArray[np.bool_] = (key * np.uint64(shares)) >> np.uint64(KEY_BITS) == np.uint64(share)
    return mine


def band_keys(band: Signatures) -> Hashes:
    """One number of 40 bits for the values of a band, [documents, rows], of each document."""
    key = np.zeros(len(band), np.uint64)
    for column in band.T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key >> np.uint64(64 - KEY_BITS)


def write_bands(signature: Signatures, rows: int, path: Path) -> None:
    """The keys of all bands, band after band: 5 bytes a document each."""
    count = signature.shape[1] // rows
    if not len(signature):
        path.touch()
        return
    keys = np.memmap(path, np.uint8, "w+", shape=(count, len(signature), KEY_BITS // 8))
    for at in range(0, len(signature), STEP):
        step = np.asarray(signature[at : at + STEP])
        for band in range(count):
            found = band_keys(step[:, band * rows : (band + 1) * rows])
            keys[band, at : at + len(step)] = found.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : KEY_BITS // 8]


def read_band(path: Path, bands: int, band: int) -> Iterator[Hashes]:
    """The keys of one band of a file that ``write_bands`` wrote, in steps."""
    if not path.stat().st_size:
        return
    keys = np.asarray(np.memmap(path, np.uint8, "r")).reshape(bands, -1, KEY_BITS // 8)[band]
    for at in range(0, len(keys), STEP):
        step = np.zeros((len(keys[at : at + STEP]), 8), np.uint8)
        step[:, : KEY_BITS // 8] = keys[at : at + STEP]
        yield step.view("<u8")[:, 0]


def shared(keys: Hashes, documents: npt.NDArray[np.uint32]) -> npt.NDArray[np.void]:
    """The documents whose key another has too, in order, each with the number of its group, as ``SHARED``.

    A group's number is that of its first row where rows are sorted by key: so many rows before it are of other groups.
    """
    order = np.argsort(keys, kind="stable")
    again = np.diff(keys[order], prepend=keys[:1]) == 0
    again[:1] = False
    member = again | np.append(again[1:], False)
    place = np.flatnonzero(member)
    start = np.flatnonzero(~again[place])
    found = np.empty(len(place), SHARED)
    found["document"] = documents[order[place]]
    found["group"] = np.repeat(start, np.diff(start, append=len(place)))
    return found[np.argsort(found["document"], kind="stable")]


def resolve(files: Sequence[Path], signatures: JoinedRows, threshold: float, memory: int) -> Iterator[tuple[int, int]]:
    """Each document that is as similar as ``threshold`` to a kept one before it, and that one, in order.

    Of documents that share a band, as ``files`` list them; only those are looked at. Which are kept of each group is
    written to files beside them. An estimate that is below the threshold by no more than its standard error counts: at
    the threshold itself five of six pairs are found, where half would be.
    """
    found = [np.asarray(np.memmap(file, SHARED, "r")) for file in files if file.stat().st_size]
    if not found:
        return
    first = np.cumsum([0, *map(len, found)])
    kept, count = (
        np.asarray(np.memmap(files[0].with_name(name), np.uint32, "w+", shape=(int(first[-1]),)))
        for name in ("kept", "count")
    )
    enough = enough_equal(threshold, signatures.width)
    for document, groups in _in_order(found, first, len(signatures), memory):
        counts = count[groups]
        near = [kept[g : g + n] for g, n in zip(groups.tolist(), counts.tolist(), strict=True) if n]
        if near:
            others = np.unique(np.concatenate(near)).astype(np.int64)
            equal = (signatures.take(others) == signatures.take(np.array([document]))).sum(1)
            if (equal >= enough).any():
                yield document, int(others[equal.argmax()])
                continue
        kept[groups + counts] = document
        count[groups] = counts + 1


def enough_equal(threshold: float, permutations: int) -> float:
    """Equal values from which two documents are near duplicates; of unequal ones the last byte agrees once in 256."""
    least: float = threshold - (threshold * (1 - threshold) / permutations) ** 0.5
    return permutations * (least + (1 - least) / 256)


def _in_order(
    found: Sequence[npt.NDArray[np.void]], first: npt.NDArray[np.int64], documents: int, memory: int
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Each document of the files and the places of its groups, through steps of as many documents as fit in memory."""
    step = max(memory // (_ROW_BYTES * len(found)), 1)
    at = [0] * len(found)
    for end in range(step, documents + step, step):
        members, groups = [], []
        for number, rows in enumerate(found):
            stop = at[number] + int(np.searchsorted(rows["document"][at[number] : at[number] + step], end))
            members.append(rows["document"][at[number] : stop])
            groups.append(rows["group"][at[number] : stop].astype(np.int64) + first[number])
            at[number] = stop
        member, group = np.concatenate(members), np.concatenate(groups)
        order = np.argsort(member, kind="stable")
        member, group = member[order], group[order]
        bounds = np.append(np.flatnonzero(np.diff(member, prepend=member[:1] - 1)), len(member)).tolist()
        for start, stop in pairwise(bounds):
            yield int(member[start]), group[start:stop]
