"""Which documents are left out, decided over all parts in the order of the text, in memory that a setting bounds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from megatron_sep.files import read_json, written_aside
from megatron_sep.prepare import worker
from megatron_sep.prepare.buckets import bucket_count
from megatron_sep.prepare.dedup import resolve
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.pool import Pool
from megatron_sep.prepare.progress import Progress
from megatron_sep.prepare.readings import Reading
from megatron_sep.prepare.rows import JoinedRows
from megatron_sep.prepare.search import Search, repeated, write_bands, write_digests, write_shared
from megatron_sep.prepare.work import DECIDED, SHARED, STEPS

DROPS = ("", "exact duplicate", "near duplicate", "contaminated", "")
"""Reasons by code; a record with the last one cannot be read, which is counted by why when it is looked at again."""
_EXACT, _NEAR, _CONTAMINATED, _UNREADABLE = 1, 2, 3, 4
_BANDS = 16
"""Bands that lie on the disk at a time, 12 bytes a document each."""

Codes = npt.NDArray[np.uint8]
_OF_STATUS: Codes = np.zeros(256, np.uint8)
_OF_STATUS[[worker.UNREADABLE, worker.CONTAMINATED]] = _UNREADABLE, _CONTAMINATED


class Drops:
    """Why records are left out, by their number among all."""

    def __init__(self, codes: Codes, first: list[int]) -> None:
        self._codes, self._first = codes, first

    @classmethod
    def load(cls, job: Job) -> "Drops | None":
        """What ``decide`` has written; None where nothing is looked for."""
        if not job.scans:
            return None
        records = [count for state in job.get_of_all("scan.json") for count in read_json(state)["value"]["records"]]
        codes = np.asarray(np.memmap(job.work.get(DECIDED), np.uint8, "r")) if sum(records) else np.empty(0, np.uint8)
        return cls(codes, np.cumsum([0, *records]).tolist())

    def reason(self, reading: Reading, record: int) -> str:
        """Why a record of a file is left out; empty: it is written, or cannot be read."""
        return DROPS[self._codes[self._first[reading.number] + record]]


def decide(job: Job, pool: Pool) -> None:
    """Write ``DECIDED``, unless it is there; killed, it begins anew. Every part must be scanned."""
    if not job.scans or job.work.has(DECIDED):
        return
    with job.work.made(DECIDED) as path, written_aside(path) as aside:
        statuses = JoinedRows(job.get_of_all("scan.status"), np.uint8, 1)
        with aside.open("wb") as file:
            for _, rows in statuses.steps():
                file.write(_OF_STATUS[rows].tobytes())
        if len(statuses) and (job.config.deduplicate.exact or job.config.deduplicate.near):
            codes = np.memmap(aside, np.uint8, "r+")
            _clear(job)
            together = -(-pool.size // pool.machines)
            buckets = bucket_count(len(codes), job.config.memory << 20, together)
            _mark_repeated(job, codes, Search(uuid4().hex[:12], statuses.first, buckets), pool)
            _clear(job)


def _clear(job: Job) -> None:
    for folder in (STEPS, SHARED):
        job.work.remove(folder)


def _mark_repeated(job: Job, codes: np.memmap[Any, Any], search: Search, pool: Pool) -> None:
    """Each step writes codes for those after it."""
    wanted = job.config.deduplicate
    bands = range(wanted.permutations // wanted.rows if wanted.near else 0)
    with Progress("compare", len(bands) + 2, "steps") as progress:
        _mark_exact(job, codes, search.at("exact"), pool)  # of near duplicates the same text is the nearest
        for done in _share_bands(job, codes, bands, search, pool):
            progress.update(1 + done)
        if wanted.near:
            signatures = JoinedRows(job.get_of_all("scan.signatures"), np.uint8, wanted.permutations)
            names = [search.shared(band, bucket) for band in bands for bucket in range(search.buckets)]
            for document, _ in resolve(job.work.get_all(names), signatures, wanted.threshold, job.config.memory << 20):
                codes[document] = _NEAR
            codes.flush()


def _mark_exact(job: Job, codes: Codes, search: Search, pool: Pool) -> None:
    with _step(job, codes, search):
        for _ in pool.map(write_digests, ((search, part) for part in range(len(search.first)))):
            pass
        for _, documents in pool.map(repeated, ((search, bucket) for bucket in range(search.buckets))):
            codes[documents] = _EXACT


def _share_bands(job: Job, codes: Codes, bands: range, search: Search, pool: Pool) -> Iterator[int]:
    """Who shares each band into files, and after each how many are done; a few bands lie in buckets at a time."""
    for start in bands[::_BANDS]:
        some, step = bands[start : start + _BANDS], search.at(f"bands-{start:04d}")
        with _step(job, codes, step):
            for _ in pool.map(write_bands, ((step, part, some) for part in range(len(search.first)))):
                pass
            tasks = ((step, some, band, bucket) for band in some for bucket in range(search.buckets))
            for (_, _, band, _), _ in pool.map(write_shared, tasks):
                yield band + 1


@contextmanager
def _step(job: Job, codes: Codes, search: Search) -> Iterator[None]:
    """Show the codes as they are now to those who search; what they make of them for each other is gone afterwards."""
    with job.work.made(search.codes) as path:
        codes.tofile(path)
    yield
    job.work.remove(search.step)
