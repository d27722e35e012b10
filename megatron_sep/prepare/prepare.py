"""Text into one shard with its receipt: read, deduplicate, decontaminate, tokenise, write.

Two stages go over the text, each a resumable ledger of what processes return in the order of the text: ``scan`` (only
where something is to be found) signs each document, ``encode`` writes the tokens of those that stay. What is written
depends on the settings and the text alone, so a killed run goes on and ends with the same bytes.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sep.attention.separators import PAPER_SEPARATORS
from megatron_sep.config.prepare import PrepareConfig, TextSourceConfig
from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.data.permutation import Permutation
from megatron_sep.data.shards import Shard, token_dtype, write_index
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sep.files import sha256, versions, write_json
from megatron_sep.prepare import worker
from megatron_sep.prepare.decontaminate import TestRuns
from megatron_sep.prepare.dedup import exact_duplicates, near_duplicates
from megatron_sep.prepare.ledger import Ledger
from megatron_sep.prepare.progress import Progress
from megatron_sep.prepare.readings import Block, Reading, blocks, readings, total_bytes
from megatron_sep.prepare.receipt import (
    Manifest,
    PrepareError,
    describe,
    finished,
    held_out_files,
    made_files,
    open_work_folder,
    publish,
    refuse_foreign,
    settings_of,
)
from megatron_sep.prepare.text import Limits

DROPS = ("", "exact duplicate", "near duplicate", "contaminated")
SAMPLED_OUT = "sampled out by weight"
_PACKAGES = ("megatron_sep", "tokenizers", "sentencepiece", "rensa", "pyarrow", "zstandard", "numpy")


def tokenize_files(
    files: Sequence[Path], tokenizer: Path, prefix: Path, eod: str | None = None, workers: int | None = None
) -> Manifest:
    """``prepare`` with nothing but files and a tokenizer."""
    source = TextSourceConfig(paths=tuple(map(str, files)))
    section = TokenizerConfig(path=tokenizer, eod=eod)
    return prepare(PrepareConfig(output=prefix, tokenizer=section, sources=(source,), workers=workers))


def prepare(config: PrepareConfig) -> Manifest:
    """Write OUTPUT.bin, .idx and .manifest.json, or go on with what a killed run left; return the manifest.

    Raises TextError, TokenizerError, PrepareError; then the work so far stays, for the next try.
    """
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.eod)
    plan = readings(config.sources, Limits("", config.on_bad, config.on_blank, config.max_bytes))
    settings = settings_of(config, plan)
    already = finished(config.output, plan, settings)
    if already is not None:
        return already
    with open_work_folder(config.output, {**settings, "changed": [r.file.stat().st_mtime_ns for r in plan]}) as folder:
        if not (folder / "manifest.json").exists():
            refuse_foreign(made_files(config.output).values())
            _make(config, plan, tokenizer, settings, folder)
        return publish(config.output, folder)


def _make(config: PrepareConfig, plan: list[Reading], tokenizer: Tokenizer, settings: Manifest, folder: Path) -> None:
    """Everything into the work folder, ``manifest.json`` last."""
    tests = held_out_files(config)
    if tests:
        limits = Limits(max_bytes=config.max_bytes)
        TestRuns.build(tests, config.decontaminate.fields, config.decontaminate.words, limits).save(folder)
    separators = _separators(tokenizer)
    with _Pool(config, plan, tuple(separators.values()), folder) as pool:
        drops = _scan(config, [r for r in plan if r.repeat == 0], pool, folder)
        counts = _encode(config, plan, drops, pool, folder)
        order = _write_shard(config, tokenizer, folder)
        made = {folder / name: path for name, path in made_files(config.output).items() if (folder / name).exists()}
        sums = dict(pool.map(sha256, iter(dict.fromkeys([*(reading.file for reading in plan), *tests, *made]))))
    manifest = {
        **describe(config, plan, counts, sums),
        "order": order,
        "separators": separators,
        "tokenizer": {
            "sha256": sha256(config.tokenizer.path),
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        "held_out": [{"path": str(file), "sha256": sums[file]} for file in tests],
        "files": {path.name: {"bytes": file.stat().st_size, "sha256": sums[file]} for file, path in made.items()},
        "settings": settings,
        "versions": versions(*_PACKAGES),
    }
    write_json(folder / "manifest.json", manifest)


class _Pool:
    """Worker processes that are started when they are first needed, and give results in order."""

    def __init__(self, config: PrepareConfig, plan: list[Reading], separators: tuple[int, ...], folder: Path) -> None:
        self.size = config.workers or len(os.sched_getaffinity(0))
        self._executor = ProcessPoolExecutor(
            self.size, get_context("spawn"), initializer=worker.start, initargs=(config, plan, separators, folder)
        )

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        """Each item with its result, in order; a few items ahead at most, so that memory does not grow."""
        waiting: deque[tuple[Any, Future[Any]]] = deque()
        try:
            for item in items:
                waiting.append((item, self._submit(function, item)))
                if len(waiting) > self.size + 2:
                    item, future = waiting.popleft()
                    yield item, future.result()
            while waiting:
                item, future = waiting.popleft()
                yield item, future.result()
        except BrokenProcessPool as error:
            raise PrepareError(
                "a worker process was killed, as by a machine without free memory; run again to go on where it "
                "stopped, with fewer workers if it happens twice"
            ) from error

    def _submit(self, function: Callable[[Any], Any], item: Any) -> Future[Any]:
        """Ctrl-C, which a terminal sends to every process, is for the first one alone: those it starts never see it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return self._executor.submit(function, item)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _scan(config: PrepareConfig, plan: list[Reading], pool: _Pool, folder: Path) -> "_Drops | None":
    """Which records are duplicates or contaminated; None where nothing is looked for."""
    wanted = config.deduplicate
    if not (wanted.exact or wanted.near or config.decontaminate.paths):
        return None
    start = {"position": [0, 0], "records": [0] * len(plan), "read": 0}
    files = ("status", "digests", "signatures", "contamination")
    with Ledger(folder, "scan", files, start) as ledger, Progress("scan", total_bytes(plan)) as progress:
        if not ledger.done:
            for block, result in pool.map(worker.scan, blocks(plan, _position(ledger))):
                for name, data in zip(files, vars(result).values(), strict=True):
                    ledger.append(name, data)
                for reading in block.readings:
                    ledger.value["records"][reading] += 1
                _advance(ledger, block, progress)
            ledger.commit(done=True)
        return _Drops.decide(config, ledger)


class _Drops:
    """Why records are left out, by their number among all."""

    def __init__(self, codes: Any, records: Sequence[int]) -> None:
        self._codes, self._first = codes, np.concatenate([[0], np.cumsum(records)])

    @classmethod
    def decide(cls, config: PrepareConfig, ledger: Ledger) -> "_Drops":
        wanted = config.deduplicate
        status = np.fromfile(ledger.path("status"), np.uint8)
        codes = np.where(status == worker.CONTAMINATED, DROPS.index("contaminated"), 0).astype(np.uint8)
        alive = status == worker.CLEAN
        if wanted.exact or wanted.near:  # the same text twice is the nearest of near duplicates
            digests = np.fromfile(ledger.path("digests"), "V16")
            codes[exact_duplicates(digests, alive) >= 0] = DROPS.index("exact duplicate")
        if wanted.near and len(status):
            signature = np.memmap(ledger.path("signatures"), np.uint32, "r").reshape(len(status), -1)
            near = near_duplicates(signature, alive & (codes == 0), wanted.threshold, wanted.rows)
            codes[near >= 0] = DROPS.index("near duplicate")
        return cls(codes, ledger.value["records"])

    def reason(self, reading: Reading, record: int) -> str:
        return DROPS[self._codes[self._first[reading.number] + record]]


def _encode(config: PrepareConfig, plan: list[Reading], drops: _Drops | None, pool: _Pool, folder: Path) -> Manifest:
    """Tokens of what stays into the ledger; returns the counts."""
    start = {"position": [0, 0], "read": 0, "sources": [vars(worker.SourceCount()) for _ in config.sources]}
    start |= {"separators": 0, "largest_gap": 0, "documents": 0}
    with (
        Ledger(folder, "encode", ("bin", "lengths"), start) as ledger,
        Progress("encode", total_bytes(plan)) as progress,
    ):
        if not ledger.done:
            todo = (_marked(block, plan, drops, config.seed) for block in blocks(plan, _position(ledger)))
            for block, result in pool.map(worker.encode, todo):
                ledger.append("bin", result.tokens)
                ledger.append("lengths", result.lengths)
                _count(ledger.value, block, result)
                _advance(ledger, block, progress)
            ledger.commit(done=True)
        return ledger.value


def _marked(block: Block, plan: list[Reading], drops: _Drops | None, seed: int) -> Block:
    """The block with the reason why each record is left out before it is looked at."""
    for number, ordinal in zip(block.readings, block.ordinals, strict=True):
        reading = plan[number]
        reason = drops.reason(reading, ordinal) if drops else ""
        block.drops.append(reason or ("" if reading.takes(ordinal, seed) else SAMPLED_OUT))
    return block


def _count(value: Manifest, block: Block, result: worker.Encoded) -> None:
    """Add a block to the counts; a further pass over a source counts as repeats only."""
    value["documents"] += len(result.lengths) // 4
    value["separators"] += result.separators
    value["largest_gap"] = max(value["largest_gap"], result.largest_gap)
    for number, count in result.counts.items():
        total = value["sources"][number]
        for key in ("written", "text_bytes", "tokens"):
            total[key] += getattr(count, key)
        if block.repeat:
            total["repeated"] += count.written
            continue
        total["read"] += count.read
        for reason, times in count.dropped.items():
            total["dropped"][reason] = total["dropped"].get(reason, 0) + times


def _position(ledger: Ledger) -> tuple[int, int]:
    reading, record = ledger.value["position"]
    return reading, record


def _advance(ledger: Ledger, block: Block, progress: Progress) -> None:
    ledger.value["position"], ledger.value["read"] = list(block.after), block.read
    ledger.commit_sometimes()
    progress.update(block.read)


def _write_shard(config: PrepareConfig, tokenizer: Tokenizer, folder: Path) -> str:
    """``shard.bin`` and ``shard.idx`` from the ledger; returns how the documents are ordered."""
    dtype = token_dtype(tokenizer.vocab_size)
    if config.decontaminate.paths:
        _link(folder / "scan.contamination", folder / "contamination.jsonl")
    if not (folder / "encode.lengths").stat().st_size:
        raise PrepareError(f"{config.output}: no document is left to write; the counts are in {folder / 'encode.json'}")
    lengths: npt.NDArray[np.int32] = np.memmap(folder / "encode.lengths", np.int32, "r")
    if not config.shuffle:
        write_index(folder / "shard.idx", lengths, dtype)
        _link(folder / "encode.bin", folder / "shard.bin")
        return "as read"
    write_index(folder / "encode.idx", lengths, dtype)
    source, count = Shard(folder / "encode.idx", [folder / "encode.bin"]), len(lengths)
    order = Permutation(count, config.seed)(np.arange(count))
    with (folder / "shard.bin").open("wb") as file:
        for document in order.tolist():
            file.write(source.document(document).tobytes())
        file.flush()
        os.fsync(file.fileno())
    write_index(folder / "shard.idx", lengths[order], dtype)
    return f"drawn from seed {config.seed}"


def _link(source: Path, name: Path) -> None:
    """A second name for a file, also where an earlier try has made it."""
    name.unlink(missing_ok=True)
    os.link(source, name)


def _separators(tokenizer: Tokenizer) -> dict[str, int]:
    """The paper's separators that are one token of this tokenizer."""
    found = {text: tokenizer.token_ids(text) for text in PAPER_SEPARATORS}
    return {text: ids[0] for text, ids in found.items() if len(ids) == 1}
