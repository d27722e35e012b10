"""Measure the stages of `prepare` at 1, 2, 4 and 8 times as much: processor time, own memory, and disk.

python tools/bench_prepare.py stages CORPUS TOKENIZER [MB [MEMORY]]            15 MB of the corpus, 16 MiB of memory
python tools/bench_prepare.py duplicates TOKENIZER [DOCUMENTS [MEMORY]]        120,000 documents, 16 MiB of memory

`stages` adds copies of the text: nine documents of ten with their words in another order, the tenth with another first
line, a near duplicate. `duplicates` is the search alone, over signatures that are drawn: one document of ten is nearly
one before it, one of a hundred is equal to it, and one of twenty shares eight bands with all others of a template but
is not near to them, as under one licence. The start of the processes is no part of a measurement.
"""

import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from megatron_sep.config.prepare import DeduplicateConfig, PrepareConfig, TextSourceConfig
from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.files import remove
from megatron_sep.prepare.assemble import assemble
from megatron_sep.prepare.decisions import decide
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.pool import ProcessPool
from megatron_sep.prepare.prepare import Wish
from megatron_sep.prepare.readings import expand
from megatron_sep.prepare.stages import encode, scan
from megatron_sep.prepare.text import Limits, read_documents
from megatron_sep.prepare.work import DECIDED, FolderWork, part_name
from megatron_sep.prepare.work_folder import whole_at_work

PARTS, STEP, PERMUTATIONS, TEMPLATES, SHARED_VALUES = 4, 5_000, 512, 20, 64
TIMES = 1, 2, 4, 8
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
    for folder in (job.folder / part_name(part) for part in range(job.count)):
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


def size_on_disk(path: Path) -> int:
    """Of a file that is not the shard's own; 0 where it is gone."""
    try:
        return 0 if path.suffix == ".bin" else path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


@dataclass
class Peak:
    """The largest values while something was watched."""

    memory: int = 0
    """Bytes of own memory."""
    disk: int = 0
    """Bytes in a folder."""
    watching: float = 0.0
    """Processor seconds of looking, which are no part of what was watched."""


@contextmanager
def watched(folder: Path) -> Iterator[Peak]:
    peak, stop = Peak(), threading.Event()

    def look() -> None:
        while not stop.wait(0.2):
            peak.memory = max(peak.memory, own_memory())
            peak.disk = max(peak.disk, sum(map(size_on_disk, folder.rglob("*"))))
            peak.watching = time.thread_time()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def warmed(pool: ProcessPool) -> None:
    """Until all processes have started."""
    for _ in pool.map(time.sleep, iter([1.0] * pool.size)):
        pass


def measured(stage: Callable[[Job, ProcessPool], object], job: Job, documents: int) -> str:
    """A stage of prepare in words."""
    with ProcessPool(job) as pool:
        warmed(pool)
        before, own, clock = spent(), time.process_time(), time.perf_counter()
        with watched(job.folder) as peak:
            stage(job, pool)
        clock = time.perf_counter() - clock
        cpu, own = spent() - before - peak.watching, time.process_time() - own - peak.watching
    return (
        f"{documents:9,} documents: {cpu / documents * 1e6:6.1f} us of CPU a document, {cpu:5.1f} s, {own:5.1f} of "
        f"them in the first process, {clock:5.1f} s on the clock, own memory {peak.memory / 2**20:.0f} MiB, "
        f"{peak.disk / documents:.0f} bytes of disk a document, load {os.getloadavg()[0]:.1f}"
    )


def write_copies(texts: list[str], folder: Path, first: int, last: int) -> None:
    for copy in range(first, last):
        generator = random.Random(copy)
        with (folder / f"{copy}.jsonl").open("w") as file:
            for text in texts:
                words = text.split(" ")
                if copy and generator.random() >= NEAR:
                    generator.shuffle(words)
                file.write(json.dumps({"text": f"copy {copy}\n{' '.join(words)}"}) + "\n")


def some_texts(corpus: str, size: int) -> list[str]:
    found, left = list[str](), size
    for file in expand([corpus], "corpus"):
        for document in read_documents(file, Limits(on_bad="skip")):
            if left <= 0:
                return found
            found.append(document.text)
            left -= len(document.text)
    return found


def stages(corpus: str, tokenizer: str, megabytes: str = "15", memory: str = "16") -> None:
    texts = some_texts(corpus, int(megabytes) * 10**6)
    with tempfile.TemporaryDirectory() as name:
        source, before = Path(name) / "text", 0
        source.mkdir()
        for times in TIMES:
            write_copies(texts, source, before, times)
            before = times
            config = config_of(tokenizer, Path(name) / f"shard{times}", source, memory)
            wish = Wish.of(config)
            of_job: dict[str, Callable[[Job, ProcessPool], object]] = {
                "scan": lambda job, pool: scan(job, 0, pool),
                "decide": decide,
                "encode": lambda job, pool: encode(job, 0, pool),
                "assemble": partial(assembled, wish),
            }
            with whole_at_work(config.output, wish.begun(), 1) as (work, parts):
                job = wish.job(work, parts)
                for title, stage in of_job.items():
                    print(f"{times} x {title:9}", measured(stage, job, times * len(texts)), flush=True)
            remove(work)


def assembled(wish: Wish, job: Job, pool: ProcessPool) -> None:
    assemble(job, wish.tokenizer, wish.settings, pool)


def duplicates(tokenizer: str, documents: str = "120000", memory: str = "16") -> None:
    with tempfile.TemporaryDirectory() as name:
        config = config_of(tokenizer, Path(name) / "shard", Path(name), memory)
        for times in TIMES:
            folder, count = Path(name) / "work", times * int(documents) // (PARTS * STEP) * PARTS * STEP
            folder.mkdir()
            job = Job(config, [], {}, folder, PARTS, FolderWork(folder))
            write_scanned(job, count)
            said = measured(decide, job, count)
            exact, near = np.bincount(np.fromfile(folder / DECIDED, np.uint8), minlength=3)[1:3].tolist()
            print(f"{times} x {said}, dropped {exact:,} and {near:,}", flush=True)
            remove(folder)


def config_of(tokenizer: str, output: Path, source: Path, memory: str) -> PrepareConfig:
    return PrepareConfig(
        output=output,
        tokenizer=TokenizerConfig(path=Path(tokenizer)),
        sources=(TextSourceConfig(paths=(str(source),)),),
        memory=int(memory),
        deduplicate=DeduplicateConfig(exact=True, near=True),
    )


if __name__ == "__main__":
    verbs: dict[str, Callable[..., None]] = {"stages": stages, "duplicates": duplicates}
    if len(sys.argv) < 3 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    print(f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} cores", flush=True)
    verbs[sys.argv[1]](*sys.argv[2:])
