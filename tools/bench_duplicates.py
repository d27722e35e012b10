"""Measure the search for duplicates over many documents: processor time, own memory and disk, at 1 to 8 times as many.

python tools/bench_duplicates.py TOKENIZER [DOCUMENTS [MEMORY]]    120,000 of them and 16 MiB where nothing is said

The signatures are drawn, not made of text: one document of ten is nearly one before it, one of a hundred is equal to
it, and one of twenty shares eight bands with all others of a template but is not near to them, as under one licence.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from megatron_sep.config.prepare import DeduplicateConfig, PrepareConfig, TextSourceConfig
from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.files import remove
from megatron_sep.prepare.decisions import decide, decided_path
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.pool import ProcessPool

PARTS, STEP, PERMUTATIONS, TEMPLATES, SHARED_VALUES = 4, 5_000, 512, 20, 64
NEAR, EQUAL, TEMPLATED = 0.10, 0.01, 0.05
CHANGED = 0.07
"""Of the values of a near duplicate."""


def drawn(generator: np.random.Generator, templates: npt.NDArray[np.uint8], count: int) -> tuple[Any, Any]:
    """Signatures [count, permutations] and digests [count, 2] of documents."""
    signatures = generator.integers(0, 256, (count, PERMUTATIONS), np.uint8)
    digests = generator.integers(0, 2**64, (count, 2), np.uint64)
    kind, before = generator.random(count), generator.integers(0, np.maximum(np.arange(count), 1))
    for document in np.flatnonzero(kind < NEAR + EQUAL).tolist():
        kept = generator.random(PERMUTATIONS) >= CHANGED
        if kind[document] < EQUAL:
            digests[document], kept = digests[before[document]], np.ones(PERMUTATIONS, bool)
        signatures[document, kept] = signatures[before[document], kept]
    templated = np.flatnonzero(kind > 1 - TEMPLATED)
    signatures[templated, :SHARED_VALUES] = templates[generator.integers(0, TEMPLATES, len(templated))]
    return signatures, digests


def write_scanned(job: Job, documents: int) -> None:
    """What the stage before leaves in the folders of the parts."""
    generator = np.random.default_rng(0)
    templates = generator.integers(0, 256, (TEMPLATES, SHARED_VALUES), np.uint8)
    for folder in job.part_folders():
        folder.mkdir()
        (folder / "scan.status").write_bytes(b"\1" * (documents // job.count))
        with (folder / "scan.signatures").open("wb") as signatures, (folder / "scan.digests").open("wb") as digests:
            for _ in range(documents // job.count // STEP):
                signature, digest = drawn(generator, templates, STEP)
                signatures.write(signature.tobytes())
                digests.write(digest.tobytes())


def processes() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def spent() -> float:
    """Processor seconds of this process and of those that it has started and that live."""
    times = [process.cpu_times() for process in processes()]
    return sum(time.user + time.system for time in times)


def own_memory() -> int:
    """Bytes that no file backs, of all processes together."""
    total = 0
    for process in processes():
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        total += sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss_Anon"))
    return total


@contextmanager
def watched(folder: Path) -> Iterator[dict[str, int]]:
    """The largest own memory and the most bytes in a folder while the block runs."""
    peak, stop = {"memory": 0, "disk": 0}, threading.Event()

    def look() -> None:
        while not stop.wait(0.1):
            files = [entry for entry in folder.rglob("*") if entry.is_file()]
            disk = sum(file.stat().st_blocks * 512 for file in files if file.exists())
            peak["memory"], peak["disk"] = max(peak["memory"], own_memory()), max(peak["disk"], disk)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def measure(config: PrepareConfig, documents: int) -> None:
    folder = config.output.parent / "work"
    folder.mkdir()
    job = Job(config, [], {}, folder, PARTS)
    write_scanned(job, documents)
    with ProcessPool(job) as pool:
        for _ in pool.map(time.sleep, iter([1.0] * pool.size)):
            pass  # the start of the processes is not what is measured
        before, clock = spent(), time.perf_counter()
        with watched(folder) as peak:
            decide(job, pool)
        cpu, clock = spent() - before, time.perf_counter() - clock
    dropped = np.bincount(np.fromfile(decided_path(job), np.uint8), minlength=3)[1:3].tolist()
    print(
        f"{documents:9,} documents: {cpu:6.1f} s of CPU, {cpu / documents * 1e6:5.1f} us a document, {clock:5.1f} s, "
        f"own memory {peak['memory'] / 2**20:.0f} MiB, {peak['disk'] / documents:.0f} bytes of disk a document, "
        f"dropped {dropped[0]:,} and {dropped[1]:,}, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    remove(folder)


def main(tokenizer: str, documents: str = "120000", memory: str = "16") -> None:
    with tempfile.TemporaryDirectory() as name:
        config = PrepareConfig(
            output=Path(name) / "shard",
            tokenizer=TokenizerConfig(path=Path(tokenizer)),
            sources=(TextSourceConfig(paths=(name,)),),
            memory=int(memory),
            deduplicate=DeduplicateConfig(exact=True, near=True),
        )
        for times in (1, 2, 4, 8):
            measure(config, times * int(documents) // (PARTS * STEP) * PARTS * STEP)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    print(f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} cores", flush=True)
    main(*sys.argv[1:])
