"""The order in which files are read, and their records in blocks that processes share among themselves."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from megatron_sep.config.prepare import TextSourceConfig
from megatron_sep.prepare.places import find, is_address
from megatron_sep.prepare.text import COMPRESSIONS, FORMATS, Limits, Record, TextError, read_records

BLOCK_BYTES = 1 << 21
"""Text of a block, about: large against the cost of handing it over, small against what all processes do a second."""
BLOCK_RECORDS = 4096


@dataclass(frozen=True)
class Reading:
    """One pass over one file."""

    source: int
    file: Path
    number: int
    """Of the file among all files."""
    repeat: int
    """Passes over the file before this one."""
    share: float
    """Documents that this pass writes; 1: all."""
    limits: Limits
    size: int
    """Bytes of the file as it lies on the disk."""

    def takes(self, record: int, seed: int) -> bool:
        """Whether this pass writes a record, by the seed."""
        if self.share >= 1:
            return True
        digest = hashlib.blake2b(f"{seed}:{self.number}:{self.repeat}:{record}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.share * 2**64


@dataclass
class Block:
    """Records in order, all of files on the same pass."""

    repeat: int
    """That pass, from 0."""
    records: list[Record] = field(default_factory=list)
    readings: list[int] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)
    """Number of each record in its file, from 0."""
    drops: list[str] = field(default_factory=list)
    """Why each record is left out without being looked at; empty: it is not."""
    size: int = 0
    after: tuple[int, int] = (0, 0)
    """Where the next block starts: (reading, record)."""
    read: int = 0
    """Bytes of the part's files read by the end of it."""


def expand(patterns: Sequence[str], key: str) -> list[Path]:
    """The files that paths, folders and globs name, each once, sorted within its pattern. Raises TextError."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        if is_address(pattern):
            addressed = [file for file in find(pattern) if has_text_suffix(file)]
            found.update(dict.fromkeys(addressed or _refuse(pattern, key)))
            continue
        path = Path(pattern)
        files = sorted(p for p in path.rglob("*") if _is_text(p)) if path.is_dir() else [path] if path.exists() else []
        if not files and not path.exists():
            anchor, parts = Path(path.anchor), path.parts[1:] if path.anchor else path.parts
            files = sorted(p for p in anchor.glob(str(Path(*parts))) if p.is_file()) if parts else []
        if not files:
            _refuse(pattern, key)
        found.update(dict.fromkeys(files))
    return list(found)


def readings(sources: Sequence[TextSourceConfig], limits: Limits) -> list[Reading]:
    """Every source once, then again those whose weight is above 1, and so on; the last pass of each in part."""
    files = [expand(source.paths, f"sources[{i}].paths") for i, source in enumerate(sources)]
    first = [sum(map(len, files[:i])) for i in range(len(files))]
    sizes = {file: file.stat().st_size for file in {file for some in files for file in some}}
    passes = range(max(-int(-source.weight // 1) for source in sources))
    return [
        Reading(
            i,
            file,
            first[i] + n,
            repeat,
            min(1.0, source.weight - repeat),
            replace(limits, field=source.field),
            sizes[file],
        )
        for repeat in passes
        for i, source in enumerate(sources)
        if source.weight > repeat
        for n, file in enumerate(files[i])
    ]


def blocks(plan: Sequence[Reading], part: range, start: tuple[int, int]) -> Iterator[Block]:
    """The records of a part of the readings, from ``start`` = (reading, record) on, in blocks without ``drops``."""
    block, before = Block(0), total_bytes(plan[part.start : start[0]])
    for number in range(start[0], part.stop):
        reading = plan[number]
        if reading.repeat != block.repeat and block.records:
            yield block
            block = Block(reading.repeat)
        block.repeat = reading.repeat
        skip = start[1] if number == start[0] else 0
        for index, record in enumerate(read_records(reading.file, reading.limits)):
            if index < skip:
                continue
            block.records.append(record)
            block.readings.append(number)
            block.ordinals.append(index)
            block.size += len(record.data)
            block.after, block.read = (number, index + 1), before + record.read
            if block.size >= BLOCK_BYTES or len(block.records) >= BLOCK_RECORDS:
                yield block
                block = Block(reading.repeat)
        before += reading.size
    if block.records:
        yield block


def total_bytes(plan: Sequence[Reading]) -> int:
    """Of the files as they lie on the disk, each as often as it is read."""
    return sum(reading.size for reading in plan)


def has_text_suffix(path: Path) -> bool:
    """Whether the name is that of a file of text, compressed or not."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSIONS]
    return bool(suffixes) and suffixes[-1] in FORMATS


def _is_text(path: Path) -> bool:
    return path.is_file() and has_text_suffix(path)


def _refuse(pattern: str, key: str) -> NoReturn:
    raise TextError(f"{key}: {pattern}: no file of text there; known are {', '.join(FORMATS)}")
