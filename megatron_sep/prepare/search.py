"""What the processes of ``prepare`` do to find duplicates: documents into buckets by key, and who shares one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sep.prepare.buckets import Documents, places_of, read_bucket, renamed, shared, write_buckets
from megatron_sep.prepare.dedup import band_keys, repeats
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.rows import STEP, JoinedRows, map_rows
from megatron_sep.prepare.shingles import Hashes
from megatron_sep.prepare.work import SHARED, STEPS, part_name
from megatron_sep.prepare.worker import this_job

Rows = npt.NDArray[Any]


@dataclass(frozen=True)
class Search:
    """A search among the documents that have no reason yet to be left out."""

    name: str
    """Of this search alone."""
    first: tuple[int, ...]
    """Number of the first document of each part."""
    buckets: int
    step: str = ""
    """Folder of what is needed as long as a step lasts."""

    def at(self, step: str) -> "Search":
        """The same in a step of this name."""
        return replace(self, step=f"{STEPS}/{self.name}/{step}")

    @property
    def codes(self) -> str:
        """A byte a document of all parts; 0: no reason."""
        return f"{self.step}/codes"

    def keys(self, part: int) -> str:
        """The documents of a part, in buckets."""
        return f"{self.step}/keys-{part:05d}"

    def shared(self, band: int, bucket: int) -> str:
        """Who shares a band, of a bucket."""
        return f"{SHARED}/{self.name}/{band:04d}-{bucket:05d}"

    def bucket(self, column: int, number: int) -> tuple[Hashes, Documents]:
        """What all parts have in a bucket."""
        names = [self.keys(part) for part in range(len(self.first))]
        work = this_job().work
        work.get_all(map(places_of, names))
        return read_bucket(work.get_all(names), column, number)

    def write(self, part: int, rows: Rows, keys: Callable[[Rows], Hashes]) -> None:
        """The documents of a part into buckets by the ``keys`` of its rows."""
        first, work = self.first[part], this_job().work
        codes = map_rows(work.get(self.codes), np.uint8, 1)[first : first + len(rows), 0]

        def steps() -> Iterator[tuple[Hashes, Documents]]:
            for at in range(0, len(rows), STEP):
                left = np.flatnonzero(codes[at : at + STEP] == 0)
                yield keys(rows[at : at + STEP][left]), (first + at + left).astype(np.uint32)

        with work.made(self.keys(part)) as path:
            write_buckets(path, steps(), self.buckets)


def write_digests(task: tuple[Search, int]) -> None:
    """Put the documents of a part into buckets by the first half of their digests."""
    search, part = task
    search.write(part, map_rows(_scanned(this_job(), part, "digests"), np.uint64, 2), lambda rows: rows[None, :, 0])


def repeated(task: tuple[Search, int]) -> Documents:
    """The documents of a bucket whose text stands before them."""
    search, number = task
    job = this_job()
    documents = shared(*search.bucket(0, number))["document"]
    digests = JoinedRows(job.get_of_all("scan.digests"), np.uint64, 2)
    found: Documents = documents[repeats(digests.take(documents.astype(np.int64)))]
    return found


def write_bands(task: tuple[Search, int, range]) -> None:
    """Put the documents of a part into buckets by each of some bands of their signatures."""
    search, part, bands = task
    wanted = this_job().config.deduplicate
    rows = map_rows(_scanned(this_job(), part, "signatures"), np.uint8, wanted.permutations)
    columns = rows[:, bands.start * wanted.rows : bands.stop * wanted.rows]
    search.write(part, columns, lambda values: band_keys(values, wanted.rows))


def write_shared(task: tuple[Search, range, int, int]) -> None:
    """Which documents of a bucket share a band, one of the step's, into a file."""
    search, bands, band, number = task
    with this_job().work.made(search.shared(band, number)) as path, renamed(path) as aside:
        shared(*search.bucket(band - bands.start, number)).tofile(aside)


def _scanned(job: Job, part: int, name: str) -> Path:
    return job.work.get(f"{part_name(part)}/scan.{name}")
