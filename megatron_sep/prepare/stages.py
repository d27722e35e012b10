"""The two passes of a part over its text, and the sums of its files; each goes on where it was killed."""

from megatron_sep.files import sha256, write_json
from megatron_sep.prepare import worker
from megatron_sep.prepare.decisions import Drops
from megatron_sep.prepare.parts import Job, partition
from megatron_sep.prepare.pool import Pool
from megatron_sep.prepare.progress import Progress
from megatron_sep.prepare.readings import Block, blocks, total_bytes
from megatron_sep.prepare.receipt import Manifest
from megatron_sep.prepare.work import Growing, part_name

SAMPLED_OUT = "sampled out by weight"
SCANNED = ("status", "digests", "signatures", "contamination")
"""Files of the first pass, in the order of the fields of ``worker.Scanned``."""


def scan(job: Job, part: int, pool: Pool) -> None:
    """Sign each document of a part and look for test sets in it. Raises TextError."""
    plan = job.first_pass
    mine = partition(plan, job.count)[part]
    start = {"position": [mine.start, 0], "records": [0] * len(mine), "read": 0, "looked_at": 0}
    with (
        job.work.ledger(part, "scan", SCANNED, start) as ledger,
        Progress(_title("scan", job, part), total_bytes(plan[mine.start : mine.stop])) as progress,
    ):
        if ledger.done:
            return
        for block, result in pool.map(worker.scan, blocks(plan, mine, _position(ledger))):
            for name, data in zip(SCANNED, vars(result).values(), strict=True):
                ledger.append(name, data)
            for reading in block.readings:
                ledger.value["records"][reading - mine.start] += 1
            _advance(ledger, block, progress)
        ledger.commit(done=True)


def encode(job: Job, part: int, pool: Pool) -> None:
    """Write the tokens of what stays of a part, and the sums of its files. Raises TextError."""
    plan = job.plan
    mine = partition(plan, job.count)[part]
    start = {
        "position": [mine.start, 0],
        "read": 0,
        "sources": [vars(worker.SourceCount()) for _ in job.config.sources],
    }
    start |= {"looked_at": 0, "separators": 0, "largest_gap": 0, "documents": 0}
    drops = Drops.load(job)
    with (
        job.work.ledger(part, "encode", ("bin", "lengths"), start) as ledger,
        Progress(_title("encode", job, part), total_bytes(plan[mine.start : mine.stop])) as progress,
    ):
        if not ledger.done:
            todo = (_marked(job, block, drops) for block in blocks(plan, mine, _position(ledger)))
            for block, result in pool.map(worker.encode, todo):
                ledger.append("bin", result.tokens)
                ledger.append("lengths", result.lengths)
                _count(ledger.value, block, result)
                _advance(ledger, block, progress)
            ledger.commit()  # the sums are of this very text, whose settings count from here on
            _sum_files(job, part, pool)
            ledger.commit(done=True)


def _sum_files(job: Job, part: int, pool: Pool) -> None:
    """The sha256 of each of the part's files into sums.json."""
    name = f"{part_name(part)}/sums.json"
    if not job.work.has(name):
        mine = partition(job.first_pass, job.count)[part]
        files = (job.first_pass[number].file for number in mine)
        sums = {str(file): found for file, found in pool.map(sha256, files)}
        with job.work.made(name) as path:
            write_json(path, sums)


def is_done(job: Job, stage: str, part: int) -> bool:
    """Whether a part is through with ``scan`` or ``encode``."""
    state = job.work.state(part, stage)
    return state is not None and bool(state["done"])


def _title(stage: str, job: Job, part: int) -> str:
    return stage if job.count == 1 else f"{stage}, part {part + 1}/{job.count}"


def _marked(job: Job, block: Block, drops: Drops | None) -> Block:
    """The block with the reason why each record is left out before it is looked at."""
    for number, ordinal in zip(block.readings, block.ordinals, strict=True):
        reading = job.plan[number]
        reason = drops.reason(reading, ordinal) if drops else ""
        block.drops.append(reason or ("" if reading.takes(ordinal, job.config.seed) else SAMPLED_OUT))
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


def _position(ledger: Growing) -> tuple[int, int]:
    reading, record = ledger.value["position"]
    return reading, record


def _advance(ledger: Growing, block: Block, progress: Progress) -> None:
    ledger.value["position"], ledger.value["read"] = list(block.after), block.read
    ledger.value["looked_at"] += len(block.records)
    ledger.commit_sometimes()
    progress.update(block.read, ledger.value["looked_at"])
