"""The Pile as it is published: one index and the tokens in numbered parts, checked, joined or cut.

The deduplicated set has 83 parts (``pile_0.87_deduped_text_document-00000-of-00082.bin`` ...), the pre-shuffled one 21
(``document-00000-of-00020.bin`` ...), of 5,000,000,000 bytes each but the last; the suffix is the last number.
Training reads the parts where they lie (``shards.BinStream``), so joining is for other programs.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_sep.data.shards import Shard, ShardError, bin_path, idx_path
from megatron_sep.files import sha256, written_aside

PART_BYTES = 5_000_000_000
JOINED = {
    "pile_0.87_deduped_text_document": "0cd548efd15974d5cca78f9baddbd59220ca675535dcfc0c350087c79f504693",
}
"""sha256 of the joined tokens, by prefix, as EleutherAI publishes it."""
_STEP = 1 << 24


@dataclass(frozen=True)
class FileCheck:
    """One file against what it should be."""

    name: str
    size: int
    sha256: str
    expected: str | None
    """None: no checksum is known for it."""

    @property
    def good(self) -> bool:
        """Nothing is known against it."""
        return self.expected is None or self.sha256 == self.expected


@dataclass(frozen=True)
class PileReport:
    """A set of files whose index and sizes agree, and the sums of each."""

    files: tuple[FileCheck, ...]
    """The index, each part, and the tokens joined."""
    documents: int
    tokens: int

    @property
    def wrong(self) -> tuple[FileCheck, ...]:
        """Files whose sum is not the one that is known."""
        return tuple(check for check in self.files if not check.good)

    @property
    def unknown(self) -> tuple[FileCheck, ...]:
        """Files for which no checksum is known."""
        return tuple(check for check in self.files if check.expected is None)


def summary(report: PileReport) -> str:
    """A line a file, then what is known of the whole."""
    marks = {True: "good", False: "WRONG"}
    lines = [
        f"{marks[check.good] if check.expected else 'no checksum':12} {check.size:>15,}  {check.sha256}  {check.name}"
        + ("" if check.good else f"  (should be {check.expected})")
        for check in report.files
    ]
    whole = f"{report.documents:,} documents, {report.tokens:,} tokens; the index and the sizes agree"
    return "\n".join([*lines, whole, f"{len(report.wrong)} wrong, {len(report.unknown)} without a checksum"])


def verify(prefix: Path, checksums: Path | None = None, workers: int | None = None) -> PileReport:
    """Read everything once: the sums of all files and of the joined tokens, and every offset of the index.

    ``checksums`` is what ``sha256sum`` writes: a sum and a name a line; a line for PREFIX.bin is of the joined file.
    Raises ShardError where files are missing or do not belong together; a wrong sum is in the report.
    """
    known: dict[str, str | None] = dict(read_checksums(checksums)) if checksums else {}
    shard = Shard.open(prefix)
    for start in range(0, len(shard.lengths), _STEP):
        shard.check_offsets(start, min(start + _STEP, len(shard.lengths)))
    files = [shard.index_path, *shard.bin_paths]
    missing = sorted(set(known) - {path.name for path in files} - {bin_path(prefix).name})
    if missing:
        raise ShardError(f"{checksums}: names files that are not in {prefix.parent}: {', '.join(missing[:4])}")
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        sums = [*pool.map(sha256, files)]
    if len(shard.bin_paths) > 1:
        files.append(bin_path(prefix))
        sums.append(_joined_sum(shard))
    known = {bin_path(prefix).name: JOINED.get(prefix.name)} | known
    checks = (
        FileCheck(path.name, path.stat().st_size if path.exists() else _size(shard), found, known.get(path.name))
        for path, found in zip(files, sums, strict=True)
    )
    return PileReport(tuple(checks), shard.num_documents, shard.num_tokens)


def join(prefix: Path, output: Path) -> str:
    """Write the parts of PREFIX as one OUTPUT.bin, with its OUTPUT.idx; return the sha256 of the tokens.

    Raises ShardError where a file of that name is there already or the disk has too little room, and OSError.
    """
    shard = Shard.open(prefix)
    _room(output, _size(shard))
    digest = hashlib.sha256()
    with written_aside(idx_path(output)) as index, written_aside(bin_path(output)) as tokens:
        shutil.copyfile(shard.index_path, index)
        with tokens.open("wb") as file:
            for piece in _pieces(shard):
                digest.update(piece)
                file.write(piece)
    return digest.hexdigest()


def split(prefix: Path, output: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Cut PREFIX.bin into OUTPUT-00000-of-NNNNN.bin ... of ``part_bytes``, with OUTPUT.idx and OUTPUT.sha256.

    A part ends at its size, within a document or a token too, as the published ones do. Raises as ``join`` does.
    """
    if part_bytes < 1:
        raise ShardError(f"part_bytes={part_bytes}: must be at least 1")
    shard = Shard.open(prefix)
    size = _size(shard)
    last = (size - 1) // part_bytes
    if last > 99_999:
        raise ShardError(f"part_bytes={part_bytes}: {size} bytes would be {last + 1} parts; at most 100000")
    _room(output, size)
    parts = [output.with_name(f"{output.name}-{i:05d}-of-{last:05d}.bin") for i in range(last + 1)]
    pieces, rest = _pieces(shard), b""
    lines = []
    for part in parts:
        digest, left = hashlib.sha256(), part_bytes
        with written_aside(part) as aside, aside.open("wb") as file:
            while left and (data := rest or next(pieces, b"")):
                piece, rest = data[:left], data[left:]
                digest.update(piece)
                file.write(piece)
                left -= len(piece)
        lines.append(f"{digest.hexdigest()}  {part.name}\n")
    with written_aside(idx_path(output)) as index:
        shutil.copyfile(shard.index_path, index)
    lines.append(f"{sha256(idx_path(output))}  {idx_path(output).name}\n")
    with written_aside(output.with_name(output.name + ".sha256")) as sums:
        sums.write_text("".join(lines))
    return parts


def read_checksums(path: Path) -> dict[str, str]:
    """Name and sum of each line of a checksum file. Raises ShardError for a line that is none."""
    if not path.is_file():
        raise ShardError(f"{path}: no such file; it is what sha256sum writes, a sum and a name a line")
    known = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        fields = line.split(maxsplit=1)
        if not fields or line.startswith("#"):
            continue
        if len(fields) != 2 or len(fields[0]) != 64 or set(fields[0].lower()) - set("0123456789abcdef"):
            raise ShardError(f"{path}, line {number}: {line[:80]!r} is no sha256 and a file name")
        known[Path(fields[1].lstrip("*")).name] = fields[0].lower()
    return known


def _pieces(shard: Shard) -> Iterator[bytes]:
    """The tokens of all parts, 16 MiB at a time."""
    for path in shard.bin_paths:
        with path.open("rb") as file:
            while piece := file.read(_STEP):
                yield piece


def _joined_sum(shard: Shard) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(shard):
        digest.update(piece)
    return digest.hexdigest()


def _size(shard: Shard) -> int:
    return sum(path.stat().st_size for path in shard.bin_paths)


def _room(output: Path, size: int) -> None:
    """The folder of the output, with room for it. Raises ShardError."""
    if bin_path(output).exists():
        raise ShardError(f"{bin_path(output)}: is there already; choose another output, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < size:
        raise ShardError(f"{output.parent}: {free / 1e9:.1f} GB are free, the tokens take {size / 1e9:.1f} GB")
