"""Documents by key, in buckets on the disk of which each fits in memory.

Equal keys are in the same bucket. A part writes the keys of its documents step by step, the rows of a step ordered by
bucket, so that each row is written once and read once however many buckets there are.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_sep.prepare.rows import Array, map_rows
from megatron_sep.prepare.shingles import Hashes

Documents = npt.NDArray[np.uint32]
KEYED = np.dtype([("key", "<u8"), ("document", "<u4")])
MEMBER = np.dtype([("document", "<u4"), ("group", "<u4")])
ROW_BYTES = 64
"""Memory that a row takes while it is sorted, with all that numpy makes of it."""


def bucket_count(documents: int, memory: int, together: int) -> int:
    """Buckets of which ``together`` fit in ``memory`` bytes."""
    return min(max(-(-documents * ROW_BYTES * together // memory), 1), 1 << 16)


def write_buckets(path: Path, steps: Iterable[tuple[Hashes, Documents]], buckets: int) -> None:
    """The keys [columns, documents] of each step and the numbers of its documents; beside them where which rows lie."""
    places, end, columns = [], 0, 1
    with renamed(path) as aside, aside.open("wb") as file:
        for keys, documents in steps:
            columns = len(keys)
            for column in keys:
                bucket = (((column >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)).astype(np.uint16)
                order = np.argsort(bucket, kind="stable")
                rows = np.empty(len(order), KEYED)
                rows["key"], rows["document"] = column[order], documents[order]
                rows.tofile(file)
                ends = end + np.cumsum(np.bincount(bucket, minlength=buckets))
                places.append(np.append(end, ends))
                end += len(rows)
    with renamed(path.with_name(places_of(path.name))) as aside, aside.open("wb") as file:
        np.save(file, np.array(places, np.int64).reshape(-1, columns, buckets + 1), allow_pickle=False)


def read_bucket(paths: Iterable[Path], column: int, bucket: int) -> tuple[Hashes, Documents]:
    """The keys of one bucket in all files and their documents, in order."""
    pieces: list[Array] = [np.empty(0, KEYED)]
    for path in paths:
        rows, places = map_rows(path, KEYED, 1)[:, 0], np.load(path.with_name(places_of(path.name)), allow_pickle=False)
        for start, stop in places[:, column, bucket : bucket + 2].tolist() if len(places) else ():
            pieces.append(rows[start:stop])
    found = np.concatenate(pieces)
    return np.ascontiguousarray(found["key"]), np.ascontiguousarray(found["document"])


def shared(keys: Hashes, documents: Documents) -> npt.NDArray[np.void]:
    """The documents whose key another has too, in order, each with the number of its group, as ``MEMBER``.

    A group's number is that of its first row where rows are sorted by key: so many rows before it are of other groups.
    """
    order = np.argsort(keys)
    again = np.diff(keys[order], prepend=keys[:1]) == 0
    again[:1] = False
    member = again | np.append(again[1:], False)
    place = np.flatnonzero(member)
    start = np.flatnonzero(~again[place])
    found = np.empty(len(place), MEMBER)
    found["document"] = documents[order[place]]
    found["group"] = np.repeat(start, np.diff(start, append=len(place)))
    return found[np.argsort(found["document"])]


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A file that gets its name when it is whole; it need not outlive the machine."""
    aside = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
    yield aside
    aside.replace(path)


def places_of(name: str) -> str:
    """[steps, columns, buckets + 1]: the row at which each bucket begins, and the end of the last."""
    return f"{name}.npy"
