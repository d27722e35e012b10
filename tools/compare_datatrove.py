"""Prepare the same text with datatrove and with `prepare`: processor time, the clock, and which documents each drops.

python tools/compare_datatrove.py CORPUS TOKENIZER PYTHON [MB]   PYTHON has datatrove[io,processing] and spacy

The text is 8 MB of the corpus where nothing is said, and after each fifth document a copy of which 1, 2, 5, 10 or 20 %
of the words are others. Both drop near duplicates and write .bin and .idx for megatron-core, with two processes and the
settings that each has where nothing is said. datatrove's stages are those of its own example of MinHash, the last one
with its writer for megatron-core.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

PROCESSES = 2
CHANGED = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of the words of a copy."""
CANDIDATES = 0.3
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
    reader = JsonlReader(corpus)
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
    for number, (pipeline, count) in enumerate(stages):
        logs = f"{folder}/logs{number}"
        LocalPipelineExecutor(pipeline, count, PROCESSES, logging_dir=logs, start_method="spawn").run()


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


def similarity(folder: str) -> dict[str, float]:
    """For each document its largest Jaccard similarity, of runs of 3 words, to one before it."""
    import numpy as np

    from megatron_sep.prepare.dedup import signatures
    from megatron_sep.prepare.shingles import Hashes, runs
    from megatron_sep.prepare.text import Limits, read_documents

    names, sets = list[str](), list[Hashes]()
    for path in sorted(Path(folder).iterdir()):
        for number, document in enumerate(read_documents(path, Limits(on_bad="skip"))):
            names.append(f"{path.name}/{number}")
            sets.append(np.unique(runs(document.text, 3)))
    signature, found = signatures(sets, 512), dict[str, float]()
    for number, (name, one) in enumerate(zip(names, sets, strict=True)):
        near = np.flatnonzero((signature[:number] == signature[number]).mean(1) >= CANDIDATES)
        common = ((sets[n], len(np.intersect1d(one, sets[n], assume_unique=True))) for n in near)
        found[name] = max((both / (len(one) + len(other) - both) for other, both in common), default=0.0)
    return found


def write_text(corpus: str, folder: Path, size: int) -> None:
    """A file a process."""
    from megatron_sep.prepare.readings import expand
    from megatron_sep.prepare.text import Limits, read_documents

    generator, left = random.Random(0), size
    files = [(folder / f"{number}.jsonl").open("w") for number in range(PROCESSES)]
    documents = (d.text for file in expand([corpus], "corpus") for d in read_documents(file, Limits(on_bad="skip")))
    for number, text in enumerate(documents):
        if left <= 0:
            break
        texts = [text]
        if number % 5 == 0:
            share = CHANGED[number // 5 % len(CHANGED)]
            texts.append(" ".join("other" if generator.random() < share else word for word in text.split(" ")))
        for each in texts:
            files[number % PROCESSES].write(json.dumps({"text": each}) + "\n")
            left -= len(each)
    for file in files:
        file.close()


def main(corpus: str, tokenizer: str, python: str, megabytes: str = "8") -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, text = Path(name), Path(name) / "text"
        text.mkdir()
        write_text(corpus, text, int(megabytes) * 10**6)
        print("prepare:  ", timed(sys.executable, "--ours", str(text), tokenizer, name), flush=True)
        print("datatrove:", timed(python, "--datatrove", str(text), tokenizer, name), flush=True)
        theirs, mine = dropped_by_datatrove(folder), dropped_by_prepare(str(text), tokenizer, folder)
        likeness = similarity(str(text))
    print(f"{len(likeness)} documents; dropped by datatrove {len(theirs)}, by prepare {len(mine)}")
    for low, high in pairwise((0.0, 0.5, 0.6, 0.7, 0.8, 0.87, 0.95, 1.01)):
        alike = {each for each, value in likeness.items() if low <= value < high}
        print(
            f"  Jaccard similarity to one before it of {low} to {min(high, 1)}: {len(alike)} documents, "
            f"datatrove drops {len(alike & theirs)}, prepare {len(alike & mine)}"
        )


if __name__ == "__main__":
    parts: dict[str, Callable[[str, str, str], None]] = {"--datatrove": with_datatrove, "--ours": ours}
    if sys.argv[1:2] and sys.argv[1] in parts:
        parts[sys.argv[1]](*sys.argv[2:])
    elif len(sys.argv) in (4, 5):
        print(f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} cores", flush=True)
        main(*sys.argv[1:])
    else:
        sys.exit(__doc__)
