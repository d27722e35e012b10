"""Measure the data pipeline: tokenising, near-duplicates against datasketch, reading samples, opening a huge index.

python tools/bench_data.py tokenise CORPUS TOKENIZER   one folder of text, one tokenizer.json
python tools/bench_data.py dedup CORPUS TOKENIZER
python tools/bench_data.py memory CORPUS TOKENIZER     the corpus and ten copies of it
python tools/bench_data.py read SHARD                  a prefix
python tools/bench_data.py open FOLDER                 writes and removes a 3 GB index there
"""

import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sep.config.prepare import DeduplicateConfig, PrepareConfig, TextSourceConfig
from megatron_sep.config.schema import DataConfig, TokenizerConfig
from megatron_sep.data.open_data import open_samples
from megatron_sep.data.samples import Samples
from megatron_sep.data.shards import CODES, HEADER, MAGIC, Shard, write_shards
from megatron_sep.data.tokenizer import cut_after_newlines
from megatron_sep.prepare.buckets import shared
from megatron_sep.prepare.dedup import band_keys, resolve, signatures
from megatron_sep.prepare.prepare import prepare
from megatron_sep.prepare.readings import expand
from megatron_sep.prepare.rows import JoinedRows
from megatron_sep.prepare.shingles import runs
from megatron_sep.prepare.text import Limits, read_documents

SKIP = Limits(on_bad="skip")
CORES = len(os.sched_getaffinity(0))


def texts(corpus: str) -> list[str]:
    return [document.text for file in expand([corpus], "corpus") for document in read_documents(file, SKIP)]


def prepared(corpus: str, tokenizer: str, output: Path, **settings: Any) -> dict[str, Any]:
    shutil.rmtree(output.parent, ignore_errors=True)
    sources = settings.pop("sources", (TextSourceConfig(paths=(corpus,)),))
    section = TokenizerConfig(path=Path(tokenizer))
    return prepare(PrepareConfig(output=output, tokenizer=section, sources=sources, on_bad="skip", **settings))


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a new process, so that no run inherits another's threads or caches."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def spent() -> float:
    """CPU seconds of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Seconds on the clock and seconds of CPU."""
    clock, cpu = time.perf_counter(), spent()
    function(*arguments)
    return time.perf_counter() - clock, spent() - cpu


def library_threads(corpus: str, tokenizer: str, pieces: int, batch: int) -> tuple[float, float]:
    """Clock and CPU seconds of the bare library on all cores over texts in memory; its ids are not even read."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    library = Tokenizer.from_file(tokenizer)
    cut = [piece for text in texts(corpus) for piece in cut_after_newlines(text, pieces)]
    batches = [cut[i : i + batch] for i in range(0, len(cut), batch)]
    return timed(lambda: [len(library.encode_batch_fast(batch, add_special_tokens=False)) for batch in batches])


def library_process(queue: Any, barrier: Any, corpus: str, tokenizer: str, number: int) -> None:
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    library = Tokenizer.from_file(tokenizer)
    cut = [piece for text in texts(corpus) for piece in cut_after_newlines(text, 5000)]
    batches = [cut[i : i + 400] for i in range(0, len(cut), 400)][number::CORES]
    barrier.wait()
    queue.put(timed(lambda: [len(library.encode_batch_fast(batch, add_special_tokens=False)) for batch in batches]))


def library_processes(corpus: str, tokenizer: str) -> tuple[float, float]:
    """Clock and CPU seconds of the bare library in one process a core, each with its share of the texts in memory."""
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(CORES)
    workers = [
        context.Process(target=library_process, args=(queue, barrier, corpus, tokenizer, i)) for i in range(CORES)
    ]
    for worker in workers:
        worker.start()
    seconds = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    return max(clock for clock, _ in seconds), sum(cpu for _, cpu in seconds)


@cache
def library(tokenizer: str) -> Any:
    """One a process."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(tokenizer)


def encode_line(line: bytes) -> list[int]:
    return [*library(os.environ["BENCH_TOKENIZER"]).encode(json.loads(line)["text"]).ids, 0]


def line_by_line(corpus: str, tokenizer: str, output: Path) -> None:
    """Megatron-style preprocessing: a process pool over lines, one document at a time, one writer."""
    from megatron_sep.prepare.text import open_text

    os.environ |= {"BENCH_TOKENIZER": tokenizer, "TOKENIZERS_PARALLELISM": "false"}
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        lines = (line for file in expand([corpus], "corpus") for line in open_text(file))
        write_shards(output, pool.imap(encode_line, lines, 32), 50_277)
        pool.close()
        pool.join()


def tokenise(corpus: str, tokenizer: str, rounds: str = "3") -> None:
    """Ours, the library two ways, and line by line, in turns, so that a busy machine is busy for all of them."""
    size = sum(len(text.encode()) for text in texts(corpus)) / 1e6
    taken: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs_of: dict[str, Callable[[], tuple[float, float]]] = {
            "prepare, all of it": lambda: timed(prepared, corpus, tokenizer, Path(folder) / "ours" / "shard"),
            "library, threads": lambda: in_fresh_process(library_threads, corpus, tokenizer, 5000, 1000),
            "library, a process a core": lambda: library_processes(corpus, tokenizer),
            "line by line": lambda: timed(line_by_line, corpus, tokenizer, Path(folder) / "lines"),
        }
        for _ in range(int(rounds)):
            for name, run in runs_of.items():
                clock, cpu = run()
                taken.setdefault(name, []).append((clock, cpu))
                print(f"{name:28} {clock:6.1f} s {size / clock:6.2f} MB/s   {cpu:6.1f} s of CPU", flush=True)
    ours = np.array(taken["prepare, all of it"])
    for name, seconds in taken.items():
        ratios = np.median(np.array(seconds) / ours, axis=0)
        print(f"{name:28} ours is {ratios[0]:.3f} x as fast by the clock, {ratios[1]:.3f} x by CPU time")


def dedup(corpus: str, tokenizer: str, words: str = "3", permutations: str = "512") -> None:
    """Time of finding near-duplicates in the corpus, and its pairs against datasketch's and against exact Jaccard."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        prepared(corpus, tokenizer, Path(folder) / "a" / "plain")
        plain = time.perf_counter() - start
        start = time.perf_counter()
        wanted = DeduplicateConfig(near=True, shingle=int(words), permutations=int(permutations))
        made = prepared(corpus, tokenizer, Path(folder) / "b" / "near", deduplicate=wanted)
        both = time.perf_counter() - start
    size = sum(source["text_bytes"] for source in made["sources"]) / 1e6
    print(f"without {plain:.1f} s, with near-duplicates {both:.1f} s; {size:.1f} MB stay; {made['documents']}")
    documents = texts(corpus)
    start = time.perf_counter()
    shingles = [runs(text, int(words)) for text in documents]
    signature = signatures(shingles, int(permutations))
    original = originals(signature)
    alone = time.perf_counter() - start
    total = sum(len(text.encode()) for text in documents) / 1e6
    print(f"near-duplicates alone, one process: {alone:.1f} s, {total / alone:.1f} MB/s")
    compare([np.unique(hashes) for hashes in shingles], original)


def originals(signature: Any) -> Any:
    """For each document the kept one before it that it repeats, or -1, in one process."""
    keys, found = band_keys(signature, 8), np.full(len(signature), -1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        signature.tofile(folder / "signatures")
        for band, key in enumerate(keys):
            shared(key, np.arange(len(key), dtype=np.uint32)).tofile(folder / f"shared-{band:03d}")
        rows = JoinedRows([folder / "signatures"], np.uint8, signature.shape[1])
        for document, original in resolve(sorted(folder.glob("shared-*")), rows, 0.87, 1 << 30):
            found[document] = original
    return found


def compare(sets: list[Any], original: Any) -> None:
    """Recall of datasketch's pairs above the threshold, and the true similarity of what was dropped."""
    from datasketch import MinHash, MinHashLSH

    start = time.perf_counter()
    index, hashes = MinHashLSH(threshold=0.87, num_perm=256), []
    for number, shingles in enumerate(sets):
        made = MinHash(num_perm=256, hashfunc=int)
        made.update_batch((shingles >> np.uint64(32)).tolist())
        hashes.append(made)
        index.insert(number, made)
    candidates = {(a, b) for a, made in enumerate(hashes) for b in index.query(made) if a < b}
    print(f"datasketch: {time.perf_counter() - start:.1f} s, {len(candidates)} candidate pairs")

    def jaccard(a: int, b: int) -> float:
        common = len(np.intersect1d(sets[a], sets[b], assume_unique=True))
        return float(common / (len(sets[a]) + len(sets[b]) - common))

    root = [n if o < 0 else int(o) for n, o in enumerate(original)]
    for name, near in (
        ("by its own estimate", [(a, b) for a, b in candidates if hashes[a].jaccard(hashes[b]) >= 0.87]),
        ("by exact Jaccard", [(a, b) for a, b in candidates if jaccard(a, b) >= 0.87]),
    ):
        found = sum(root[a] == root[b] or original[b] >= 0 or original[a] >= 0 for a, b in near)
        strict = sum(root[a] == root[b] for a, b in near)
        print(f"pairs at 0.87 and above {name}: {len(near)}, with one of them dropped: {found}, same group: {strict}")
    true = np.array([jaccard(n, int(o)) for n, o in enumerate(original) if o >= 0])
    print(f"dropped: {len(true)}, of true Jaccard below 0.75: {(true < 0.75).sum()}, lowest {true.min(initial=1):.3f}")


@contextmanager
def watched() -> Iterator[list[int]]:
    """The largest sum of the proportional memory of this process and its children, in bytes, while the block runs."""
    import psutil

    peak, stop = [0], threading.Event()

    def look() -> None:
        me = psutil.Process()
        while not stop.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def write_copies(corpus: str, folder: Path, times: int) -> None:
    for copy in range(times):
        rows = (json.dumps({"text": f"copy {copy}\n{text}"}) + "\n" for text in texts(corpus))
        (folder / f"{copy:02d}.jsonl").write_text("".join(rows))


def memory(corpus: str, tokenizer: str, copies: str = "10") -> None:
    """Peak memory of prepare with near-duplicates over the corpus, and over copies of it told apart by a first line."""
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, int(copies)):
            source = Path(folder) / f"text{times}"
            source.mkdir()
            in_fresh_process(write_copies, corpus, source, times)
            with watched() as peak:
                start = time.perf_counter()
                wanted = DeduplicateConfig(exact=True, near=True, threshold=1.0)
                made = prepared(str(source), tokenizer, Path(folder) / "out" / "shard", deduplicate=wanted)
            seconds = time.perf_counter() - start
            print(f"{times} x: {made['tokens']:,} tokens, {seconds:.0f} s, peak {peak[0] / 2**20:.0f} MiB", flush=True)
            shutil.rmtree(source)


def shuffled(prefix: str, seed: int) -> Samples:
    """All of a shard as samples of 2049 tokens."""
    data = DataConfig(path=Path(prefix), split=(1, 0, 0), seed=seed)
    return open_samples(data, "train", 2048, vocab_size=50_304, num_samples=1)


def read_many(prefix: str, seed: int, count: int) -> float:
    data = shuffled(prefix, seed)
    data.take(0, data.num_samples)
    start = time.perf_counter()
    for first in range(0, count, 64):
        data.take(first, 64)
    return time.perf_counter() - start


def read(prefix: str, count: str = "100000") -> None:
    """Random samples of 2049 tokens a second from two processes, cache warm."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        seconds = pool.starmap(read_many, [(prefix, seed, int(count)) for seed in range(2)])
    print(f"{2 * int(count) / max(seconds):,.0f} samples/s from 2 processes ({max(seconds):.2f} s)")


def open_huge(folder: str, tokens: str = "300000000000") -> None:
    """Open an index of 2049-token sequences; its .bin is a sparse file."""
    count = int(tokens) // 2049
    prefix = Path(folder) / "huge"
    index = prefix.with_suffix(".idx")
    try:
        with index.open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, CODES[np.uint16], count, count + 1))
            for start in range(0, count, 1 << 22):
                np.full(min(1 << 22, count - start), 2049, "<i4").tofile(file)
            for scale, end in ((4098, count), (1, count + 1)):
                for start in range(0, end, 1 << 22):
                    (np.arange(start, min(start + (1 << 22), end), dtype="<i8") * scale).tofile(file)
        with prefix.with_suffix(".bin").open("wb") as file:
            file.truncate(count * 4098)
        print(in_fresh_process(open_one, str(prefix)))
    finally:
        index.unlink(missing_ok=True)
        prefix.with_suffix(".bin").unlink(missing_ok=True)


def open_one(prefix: str) -> str:
    before, start = own_memory(), time.perf_counter()
    shard = Shard.open(Path(prefix))
    seconds = time.perf_counter() - start
    shuffled(prefix, seed=0).take(0, 64)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{shard.num_tokens:,} tokens, {len(shard.lengths):,} sequences: opened in {seconds:.2f} s, "
        f"{own_memory() - before:.1f} MiB of the process's own memory more; peak resident {largest:.0f} MiB, "
        "pages of the index included"
    )


def own_memory() -> float:
    """MiB that are no page cache."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) / 1024


if __name__ == "__main__":
    verbs: dict[str, Callable[..., None]] = {
        "tokenise": tokenise,
        "dedup": dedup,
        "memory": memory,
        "read": read,
        "open": open_huge,
    }
    if len(sys.argv) < 3 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    print(f"{time.strftime('%Y-%m-%d')}, {CORES} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    verbs[sys.argv[1]](*sys.argv[2:])
