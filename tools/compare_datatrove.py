"""Prepare the same text with datatrove and with `prepare`: processor time, the clock, and which documents each drops.

python tools/compare_datatrove.py CORPUS TOKENIZER PYTHON   PYTHON has datatrove[io,processing] and spacy

Both read .jsonl.zst, drop near duplicates and write .bin and .idx for megatron-core, with two processes and the
settings that each has where nothing is said. datatrove's stages are those of its own example of MinHash, the last one
with its writer for megatron-core.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESSES = 2
CANDIDATES = 0.5
"""Share of equal values from which a pair's own similarity is computed."""


def with_datatrove(corpus: str, tokenizer: str, folder: str) -> None:
    """Runs in the other Python."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    tasks = len(list(Path(corpus).iterdir()))
    config = minhash.MinhashConfig()
    places = {name: f"{folder}/{name}" for name in ("signatures", "buckets", "removed", "dropped", "shard")}
    reader = JsonlReader(corpus, compression="zstd")
    stages: list[tuple[list[Any], int]] = [
        ([reader, minhash.MinhashDedupSignature(places["signatures"], config)], tasks),
        ([minhash.MinhashDedupBuckets(places["signatures"], places["buckets"], config=config)], config.num_buckets),
        ([minhash.MinhashDedupCluster(places["buckets"], places["removed"], config=config)], 1),
        (
            [
                reader,
                minhash.MinhashDedupFilter(places["removed"], exclusion_writer=JsonlWriter(places["dropped"])),
                MegatronDocumentTokenizer(places["shard"], tokenizer_name_or_path=tokenizer),
            ],
            tasks,
        ),
    ]
    for pipeline, count in stages:
        LocalPipelineExecutor(pipeline, tasks=count, workers=PROCESSES, start_method="spawn").run()


def dropped_by_datatrove(folder: Path) -> set[str]:
    """Names of documents: file and number in it, from 0."""
    import gzip

    found = set()
    for path in (folder / "dropped").glob("*.jsonl.gz"):
        for line in gzip.decompress(path.read_bytes()).splitlines():
            found.add("/".join(json.loads(line)["id"].rsplit("/", 2)[-2:]))
    return found


def config_of(corpus: str, tokenizer: str, output: Path) -> Any:
    from megatron_sep.config.prepare import DeduplicateConfig, PrepareConfig, TextSourceConfig
    from megatron_sep.config.schema import TokenizerConfig

    return PrepareConfig(
        output=output,
        tokenizer=TokenizerConfig(path=Path(tokenizer)),
        sources=(TextSourceConfig(paths=(corpus,)),),
        on_bad="skip",
        workers=PROCESSES,
        deduplicate=DeduplicateConfig(exact=True, near=True),
    )


def dropped_by_prepare(corpus: str, tokenizer: str, folder: Path) -> set[str]:
    """The same of ours, from the first pass alone."""
    from megatron_sep.prepare.decisions import Drops, decide
    from megatron_sep.prepare.pool import ProcessPool
    from megatron_sep.prepare.prepare import Wish
    from megatron_sep.prepare.stages import scan
    from megatron_sep.prepare.text import read_records
    from megatron_sep.prepare.work_folder import whole_at_work

    wish = Wish.of(config_of(corpus, tokenizer, folder / "again"))
    with whole_at_work(wish.config.output, wish.begun(), 1) as (work, parts):
        job = wish.job(work, parts)
        with ProcessPool(job) as pool:
            scan(job, 0, pool)
            decide(job, pool)
        drops = Drops.load(job)
        assert drops is not None
        return {
            f"{reading.file.name}/{number}"
            for reading in job.plan
            for number, _ in enumerate(read_records(reading.file, reading.limits))
            if drops.reason(reading, number)
        }


def ours(corpus: str, tokenizer: str, folder: str) -> None:
    from megatron_sep.prepare.prepare import prepare

    prepare(config_of(corpus, tokenizer, Path(folder) / "ours"))


def timed(python: str, which: str, *arguments: str) -> str:
    """Processor seconds and seconds of a run in a process of its own."""
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([python, __file__, which, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    after, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - clock
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{cpu:6.1f} s of CPU, {clock:6.1f} s on the clock, load {os.getloadavg()[0]:.1f}"


def similarity(corpus: str, names: set[str]) -> dict[str, float]:
    """For each named document its largest Jaccard similarity, of runs of 3 words, to any other document."""
    import numpy as np

    from megatron_sep.prepare.dedup import signatures
    from megatron_sep.prepare.shingles import Hashes, runs
    from megatron_sep.prepare.text import Limits, read_documents

    limits, of = Limits(on_bad="skip"), dict[str, int]()
    sets: list[Hashes] = []
    for path in sorted(Path(corpus).iterdir()):
        for number, document in enumerate(read_documents(path, limits)):
            of[f"{path.name}/{number}"] = len(sets)
            sets.append(np.unique(runs(document.text, 3)))
    signature, found = signatures(sets, 512), dict[str, float]()
    for name in names:
        one = sets[of[name]]
        near = np.flatnonzero((signature == signature[of[name]]).mean(1) >= CANDIDATES)
        common = ((sets[n], len(np.intersect1d(one, sets[n], assume_unique=True))) for n in near if n != of[name])
        found[name] = max((both / (len(one) + len(other) - both) for other, both in common), default=0.0)
    return found


def main(corpus: str, tokenizer: str, python: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("prepare:  ", timed(sys.executable, "--ours", corpus, tokenizer, name), flush=True)
        print("datatrove:", timed(python, "--datatrove", corpus, tokenizer, name), flush=True)
        theirs, mine = dropped_by_datatrove(folder), dropped_by_prepare(corpus, tokenizer, folder)
    likeness = similarity(corpus, theirs | mine)
    print(f"dropped: by datatrove {len(theirs)}, by prepare {len(mine)}")
    for title, names in (("both", theirs & mine), ("datatrove alone", theirs - mine), ("prepare alone", mine - theirs)):
        values = sorted(likeness[each] for each in names)
        above = sum(value >= 0.87 for value in values)
        print(f"  by {title}: {len(names)}, {above} of them at 0.87 and above, {values[:1]} the least")


if __name__ == "__main__":
    parts: dict[str, Callable[[str, str, str], None]] = {"--datatrove": with_datatrove, "--ours": ours}
    if len(sys.argv) == 5 and sys.argv[1] in parts:
        parts[sys.argv[1]](*sys.argv[2:])
    elif len(sys.argv) == 4:
        print(f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} cores", flush=True)
        main(*sys.argv[1:])
    else:
        sys.exit(__doc__)
