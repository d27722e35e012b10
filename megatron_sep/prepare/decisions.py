"""Which documents are left out, decided over all parts in the order of the text, in memory that a setting bounds."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_sep.files import read_json, remove, written_aside
from megatron_sep.prepare import worker
from megatron_sep.prepare.dedup import in_share, repeats, resolve
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.pool import Pool
from megatron_sep.prepare.progress import Progress
from megatron_sep.prepare.readings import Reading
from megatron_sep.prepare.rows import JoinedRows

DROPS = ("", "exact duplicate", "near duplicate", "contaminated", "")
"""Reasons by code; a record with the last one cannot be read, which is counted by why when it is looked at again."""
_EXACT, _NEAR, _CONTAMINATED, _UNREADABLE = 1, 2, 3, 4
_DIGEST_BYTES = 64
"""Memory that a digest takes while it is sorted, with its number and what numpy makes of both."""

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
        records = [
            count for folder in job.part_folders() for count in read_json(folder / "scan.json")["value"]["records"]
        ]
        codes = np.asarray(np.memmap(decided_path(job), np.uint8, "r")) if sum(records) else np.empty(0, np.uint8)
        return cls(codes, np.cumsum([0, *records]).tolist())

    def reason(self, reading: Reading, record: int) -> str:
        """Why a record of a file is left out; empty: it is written, or cannot be read."""
        return DROPS[self._codes[self._first[reading.number] + record]]


def decided_path(job: Job) -> Path:
    """A byte a record of all parts."""
    return job.folder / "drops"


def decide(job: Job, pool: Pool) -> None:
    """Write ``decided_path``, unless it is there; killed, it begins anew. Every part must be scanned."""
    if not job.scans or decided_path(job).exists():
        return
    with written_aside(decided_path(job)) as aside:
        with aside.open("wb") as file:
            for _, rows in JoinedRows(_files(job, "status"), np.uint8, 1).steps():
                file.write(_OF_STATUS[rows].tobytes())
        if not aside.stat().st_size:
            return
        codes = np.memmap(aside, np.uint8, "r+")
        wanted = job.config.deduplicate
        if wanted.exact or wanted.near:  # the same text twice is the nearest of near duplicates
            _mark_exact(job, codes)
        if wanted.near:
            _mark_near(job, codes, aside, pool)
        codes.flush()


def _mark_exact(job: Job, codes: Codes) -> None:
    """Share by share of all digests, each of which fits in memory."""
    digests = JoinedRows(_files(job, "digests"), np.uint64, 2)
    shares = -(-len(codes) * _DIGEST_BYTES // (job.config.memory << 20))
    for share in range(shares):
        numbers, found = [], []
        for at, rows in digests.steps():
            mine = (codes[at : at + len(rows)] == 0) & in_share(rows[:, 0] >> np.uint64(24), share, shares)
            numbers.append(at + np.flatnonzero(mine))
            found.append(rows[mine])
        codes[np.concatenate(numbers)[repeats(np.concatenate(found))]] = _EXACT


def _mark_near(job: Job, codes: Codes, path: Path, pool: Pool) -> None:
    """Each part turns its signatures into bands, each band finds who shares it, and one process looks at those."""
    scratch = job.folder / "near"
    remove(scratch)
    scratch.mkdir()
    wanted = job.config.deduplicate
    bands = wanted.permutations // wanted.rows
    together = -(-min(pool.size, bands) // pool.machines)
    with Progress("compare", bands + 2, "bands") as progress:
        for _ in pool.map(worker.write_bands, ((scratch, part) for part in range(job.count))):
            progress.update(1)
        for band, _ in pool.map(worker.write_shared, ((scratch, band, path, together) for band in range(bands))):
            progress.update(2 + band[1])
        signatures = JoinedRows(_files(job, "signatures"), np.uint8, wanted.permutations)
        files = sorted(scratch.glob("shared-*"))
        for document, _ in resolve(files, signatures, wanted.threshold, job.config.memory << 20):
            codes[document] = _NEAR
    remove(scratch)


def _files(job: Job, name: str) -> list[Path]:
    return [folder / f"scan.{name}" for folder in job.part_folders()]
