"""What the processes of ``prepare`` do to a block of records; each loads its tokenizer once."""

import os
import threading
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sep.data.shards import token_dtype
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sep.prepare.decontaminate import TestRuns, report_line
from megatron_sep.prepare.dedup import signatures, text_digest
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.readings import Block
from megatron_sep.prepare.shingles import Hashes, runs
from megatron_sep.prepare.text import Tally, admit

UNREADABLE, CLEAN, CONTAMINATED = range(3)


@dataclass
class Scanned:
    """What deduplication and decontamination need of each record of a block."""

    status: bytes
    """A byte a record: UNREADABLE, CLEAN or CONTAMINATED."""
    digests: bytes
    """16 bytes a record."""
    signatures: bytes
    """uint8 [records, permutations], or nothing where near duplicates are not looked for."""
    report: bytes
    """A line of JSON for each contaminated document."""


@dataclass
class SourceCount:
    """Documents of one source: read = written - repeated + dropped."""

    read: int = 0
    written: int = 0
    repeated: int = 0
    """Written once more than the first time, because of the weight."""
    dropped: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0
    """UTF-8 bytes of the documents written."""
    tokens: int = 0


@dataclass
class Encoded:
    """The documents of a block that stay."""

    tokens: bytes
    """Of all documents, in the dtype of the shard."""
    lengths: bytes
    """int32, tokens of each document."""
    counts: dict[int, SourceCount]
    """By the number of the source."""
    separators: int
    """Tokens that are one."""
    largest_gap: int
    """The most tokens from one separator to the next, or to an end of the document."""


class Worker:
    """The state of a process."""

    def __init__(self, job: Job) -> None:
        self.job, self.config, self.plan = job, job.config, job.plan
        config = job.config
        self.tokenizer: Tokenizer = load_tokenizer(job.tokenizer_path, config.tokenizer.eod)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.ends = np.zeros(self.tokenizer.vocab_size, bool)
        self.ends[list(job.separators.values())] = True
        self.tests = TestRuns.load(job.work.get_all(TestRuns.FILES)[-1].parent) if config.decontaminate.paths else None

    def text(self, block: Block, index: int, tally: Tally) -> str | None:
        """The text of a record, normalised as asked; None where it is unreadable and counted."""
        reading = self.plan[block.readings[index]]
        text = admit(block.records[index], reading.limits, tally)
        form = self.config.normalize
        return text if text is None or form == "none" else unicodedata.normalize(_FORMS[form], text)

    def scan(self, block: Block) -> Scanned:
        """Sign each record and look for test sets in it. Raises TextError under the policy ``fail``."""
        status, digests, report = bytearray(), bytearray(), bytearray()
        shingles: list[Hashes] = []
        settings, tally = self.config.deduplicate, Tally()
        for index, record in enumerate(block.records):
            text = self.text(block, index, tally)
            found = self.tests.find(text) if self.tests and text is not None else None
            contaminated = found is not None and found.matches >= self.config.decontaminate.matches
            if found is not None and contaminated:
                report += report_line(f"{record.file}:{record.line}", found)
            status.append(UNREADABLE if text is None else CONTAMINATED if contaminated else CLEAN)
            digests += text_digest(text or "")
            if settings.near:
                shingles.append(runs(text or "", settings.shingle))
        signature = signatures(shingles, settings.permutations).tobytes() if settings.near else b""
        return Scanned(bytes(status), bytes(digests), signature, bytes(report))

    def encode(self, block: Block) -> Encoded:
        """Tokens of the records without a reason to be dropped. Raises TextError under the policy ``fail``."""
        counts: dict[int, SourceCount] = {}
        texts, owners = [], []
        for index, drop in enumerate(block.drops):
            count = counts.setdefault(self.plan[block.readings[index]].source, SourceCount())
            count.read += 1
            tally = Tally()
            text = None if drop else self.text(block, index, tally)
            count.dropped.update([drop] if drop else tally.dropped)
            if text is not None:
                texts.append(text)
                owners.append(count)
        tokens, lengths = self._tokens(texts)
        for count, text, length in zip(owners, texts, lengths.tolist(), strict=True):
            count.written += 1
            count.text_bytes += len(text.encode())
            count.tokens += length
        separators, gap = self._separators(tokens, lengths)
        return Encoded(tokens.tobytes(), lengths.tobytes(), counts, separators, gap)

    def _tokens(self, texts: list[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """The tokens of all texts, each closed by the end-of-document token, and their lengths."""
        end = np.array([self.tokenizer.eod_id], self.dtype)
        parts: list[npt.NDArray[Any]] = []
        lengths = []
        for ids in self.tokenizer.encode_batch(texts):
            parts += [np.array(ids, self.dtype), end]
            lengths.append(len(ids) + 1)
        return np.concatenate(parts) if parts else np.empty(0, self.dtype), np.array(lengths, np.int32)

    def _separators(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> tuple[int, int]:
        """How many separators, and the most tokens from one to the next or to an end of the document."""
        marks = self.ends[tokens]
        separators = int(marks.sum())
        marks[lengths.cumsum() - 1] = True
        gaps = np.diff(np.flatnonzero(marks), prepend=-1)
        return separators, int(gaps.max(initial=0))


_FORMS: dict[str, Any] = {"nfc": "NFC", "nfkc": "NFKC"}
_worker: Worker | None = None


def start(job: Job) -> None:
    """Make this process a worker: one core, and an end when the process that started it ends."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    work_on(job)


def work_on(job: Job) -> None:
    """Make this process a worker of a job, on one core."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = Worker(job)


def is_at_work() -> bool:
    """Whether this process is a worker."""
    return _worker is not None


def _this() -> Worker:
    assert _worker is not None
    return _worker


def this_job() -> Job:
    """What this process works on."""
    return _this().job


def scan(block: Block) -> Scanned:
    """``Worker.scan`` of this process."""
    return _this().scan(block)


def encode(block: Block) -> Encoded:
    """``Worker.encode`` of this process."""
    return _this().encode(block)


def _follow_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for it for ever."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
