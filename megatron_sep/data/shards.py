"""Tokens on disk: megatron-core's ``.bin``/``.idx`` pair, memory-mapped and checked when it is opened.

``.bin`` holds the tokens of all sequences, one after the other. ``.idx``, little-endian: 9 bytes of magic, version
u64 = 1, dtype code u8, number of sequences u64, number of document bounds u64; then each sequence's length i32, each
sequence's byte offset i64, and the sequence at which each document starts i64, closed by the number of sequences.
Both are written here from arrays because megatron-core's builder keeps Python lists of every document; the tests hold
the bytes equal to its.
"""

import mmap
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sep.errors import UserError
from megatron_sep.files import written_aside

Tokens = npt.NDArray[Any]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FULL_CHECK = 1 << 24
"""Sequences up to which opening checks every offset of the index; a larger index is checked at its ends."""
_STEP = 1 << 20


class ShardError(UserError):
    """A shard that cannot be read or written as asked."""


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """megatron-core's choice: uint16 below 65500 entries, int32 from there."""
    return np.uint16 if vocab_size < 65500 else np.int32


def bin_path(prefix: Path) -> Path:
    """The tokens of a shard."""
    return beside(prefix, ".bin")


def idx_path(prefix: Path) -> Path:
    """The index of a shard."""
    return beside(prefix, ".idx")


def beside(prefix: Path, ending: str) -> Path:
    """A file of a shard by the ending of its name. Raises ShardError for a prefix that is no name."""
    if not prefix.name:
        raise ShardError(f"{prefix}: names a folder; give the name of the files in it, without .bin and .idx")
    return prefix.with_name(prefix.name + ending)


def manifest_path(prefix: Path) -> Path:
    """The receipt of a shard that `prepare` made."""
    return beside(prefix, ".manifest.json")


def write_shards(prefix: Path, documents: Iterable[Sequence[int] | Tokens], vocab_size: int) -> "Shard":
    """Write one sequence a document to PREFIX.bin and PREFIX.idx, aside and then renamed, and open it.

    The index gets its name last, and one that is there goes first: a killed run never leaves the index of one shard
    beside the tokens of another. Raises ShardError, naming the document, for a token id that the vocabulary does not
    have; then nothing has changed.
    """
    dtype, lengths = token_dtype(vocab_size), array("i")
    with written_aside(idx_path(prefix)) as index, written_aside(bin_path(prefix)) as tokens:
        with tokens.open("wb") as file:
            for number, document in enumerate(documents):
                ids = np.asarray(document)
                _check_ids(ids, vocab_size, f"{bin_path(prefix)}: document {number}")
                file.write(ids.astype(dtype).tobytes())
                lengths.append(ids.size)
        write_index(index, np.asarray(lengths, np.int32), dtype)
        idx_path(prefix).unlink(missing_ok=True)
    return Shard.open(prefix)


def _check_ids(ids: Tokens, vocab_size: int, place: str) -> None:
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ShardError(f"{place} has token id {outside[0]}, the vocabulary has {vocab_size}")


def write_index(path: Path, lengths: npt.NDArray[np.int32], dtype: type[np.integer[Any]]) -> None:
    """The ``.idx`` of documents that are one sequence each, through steps of a million: no list, no second copy."""
    count = len(lengths)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, CODES[dtype], count, count + 1))
        file.write(lengths.astype("<i4").tobytes())
        offset = 0
        for start in range(0, count, _STEP):
            ends = offset + lengths[start : start + _STEP].astype(np.int64).cumsum() * np.dtype(dtype).itemsize
            file.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        for start in range(0, count + 1, _STEP):
            file.write(np.arange(start, min(start + _STEP, count + 1), dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())


class Shard:
    """The documents of one index as one stream of tokens; nothing of it is in memory but the pages in use.

    The tokens may lie in several files, which are read in place as if they were joined.
    """

    def __init__(self, index: Path, bins: Sequence[Path]) -> None:
        self.index_path, self.bin_paths = index, tuple(bins)
        self.dtype, self.lengths, self.pointers, self.documents = _read_index(index)
        self._stream = BinStream(self.bin_paths, self.dtype)
        self._check()

    @classmethod
    def open(cls, prefix: Path) -> "Shard":
        """Open PREFIX.idx with PREFIX.bin or, where there is none, with PREFIX-00000-of-00082.bin and its fellows.

        Raises ShardError for files that are missing, cut short, no shard, or do not belong together.
        """
        index, single = idx_path(prefix), bin_path(prefix)
        parts = [single] if single.exists() else find_parts(prefix)
        for path in (index, *parts):
            if not path.is_file():
                raise ShardError(f"{path}: no such file; data.path is the name without .bin and .idx")
        if not parts:
            raise ShardError(f"{single}: no such file, and no {prefix.name}-NNNNN-of-NNNNN.bin beside {index}")
        return cls(index, parts)

    @property
    def num_documents(self) -> int:
        """Empty ones included."""
        return len(self.documents) - 1

    @property
    def num_tokens(self) -> int:
        """Of all documents, in all files."""
        return self._stream.num_tokens

    def document_start(self, document: int) -> int:
        """Offset in tokens of the first token of ``document``; of ``num_documents``: the end of the stream."""
        sequence = int(self.documents[document])
        return self.num_tokens if sequence == len(self.pointers) else int(self.pointers[sequence]) // self._itemsize

    def document_at(self, position: int) -> int:
        """The document that holds the token at ``position`` of the stream."""
        low, high = 0, self.num_documents
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.document_start(middle) <= position else (low, middle)
        return low

    def document(self, number: int) -> Tokens:
        """The tokens of one document, as ``tokens`` gives them."""
        return self.tokens(self.document_start(number), self.document_start(number + 1))

    def tokens(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of the stream, in the shard's dtype: a view of the file where it can be one."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ShardError(f"{self.bin_paths[0]}: asked for tokens {start} to {stop} of {self.num_tokens}")
        return self._stream.read(start, stop)

    @property
    def _itemsize(self) -> int:
        return int(np.dtype(self.dtype).itemsize)

    def _check(self) -> None:
        """The index agrees with itself and with the size of the tokens."""
        count = len(self.lengths)
        if not count or not self.num_documents:
            raise ShardError(f"{self.index_path}: holds no documents")
        if self.documents[0] != 0 or self.documents[-1] != count:
            raise ShardError(
                f"{self.index_path}: its documents cover sequences {self.documents[0]} to {self.documents[-1]}, "
                f"it holds 0 to {count}: the index is damaged"
            )
        for start in range(0, count, _STEP) if count <= FULL_CHECK else (0, max(0, count - _STEP)):
            self.check_offsets(start, min(start + _STEP, count))
        expected = int(self.pointers[-1]) + int(self.lengths[-1]) * self._itemsize
        if expected != self._stream.size:
            names = ", ".join(str(path) for path in self.bin_paths[:2]) + (" ..." if len(self.bin_paths) > 2 else "")
            raise ShardError(
                f"{names}: {self._stream.size} bytes, {self.index_path} describes {expected}: "
                "the tokens are cut short or belong to another index"
            )

    def check_offsets(self, start: int, stop: int) -> None:
        """Sequences [start, stop) follow each other without a gap, and documents hold whole sequences in order."""
        lengths = self.lengths[start:stop].astype(np.int64)
        at = int(self.pointers[start]) if start else 0
        ends = at + lengths.cumsum() * self._itemsize
        wrong = np.flatnonzero((self.pointers[start:stop] != np.concatenate([[at], ends[:-1]])) | (lengths < 0))
        if wrong.size:
            number = start + int(wrong[0])
            raise ShardError(
                f"{self.index_path}: sequence {number} is said to start at byte {self.pointers[number]} with "
                f"{self.lengths[number]} tokens, which does not follow the one before it: the index is damaged"
            )
        documents = self.documents[start : stop + 1]
        backward = np.flatnonzero(np.diff(documents) < 0)
        if backward.size:
            number = start + int(backward[0])
            raise ShardError(
                f"{self.index_path}: document {number} starts at sequence {self.documents[number]} and ends at "
                f"{self.documents[number + 1]}: the index is damaged"
            )


class BinStream:
    """Files of tokens, one after the other, read in place; a token may lie across two of them."""

    def __init__(self, paths: Sequence[Path], dtype: type[np.integer[Any]]) -> None:
        self._dtype = np.dtype(dtype)
        self._maps = [_map(path) for path in paths]
        self._ends = np.cumsum([len(m) for m in self._maps])
        self.size = int(self._ends[-1])
        self.num_tokens = self.size // self._dtype.itemsize

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop), which must be there: a view of a file where they lie in one."""
        first, last = start * self._dtype.itemsize, stop * self._dtype.itemsize
        part = int(np.searchsorted(self._ends, first, side="right")) if len(self._maps) > 1 else 0
        if start == stop:
            return np.empty(0, self._dtype)
        if last <= self._ends[part]:
            base = int(self._ends[part]) - len(self._maps[part])
            return np.frombuffer(self._maps[part], self._dtype, stop - start, first - base)
        return np.frombuffer(b"".join(self._slices(part, first, last)), self._dtype)

    def _slices(self, part: int, first: int, last: int) -> Iterable[bytes]:
        while first < last:
            end = int(self._ends[part])
            base = end - len(self._maps[part])
            yield bytes(self._maps[part][first - base : min(last, end) - base])
            first, part = max(first, min(last, end)), part + 1


def find_parts(prefix: Path) -> list[Path]:
    """The files PREFIX-00000-of-00082.bin to PREFIX-00082-of-00082.bin, in order; the suffix is the last number.

    Raises ShardError, naming them, where some are missing.
    """
    found = sorted(prefix.parent.glob(f"{prefix.name}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].bin"))
    if not found:
        return []
    last = int(found[0].stem[-5:])
    wanted = [prefix.parent / f"{prefix.name}-{i:05d}-of-{last:05d}.bin" for i in range(last + 1)]
    missing = [path.name for path in wanted if path not in found]
    strange = [path.name for path in found if path not in wanted]
    if missing or strange:
        raise ShardError(
            f"{prefix.parent}: {len(found)} parts of {prefix.name}, of {len(wanted)}; "
            f"missing: {', '.join(missing[:4]) or 'none'}; of another set: {', '.join(strange[:4]) or 'none'}"
        )
    return wanted


def _map(path: Path) -> Any:
    if not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def _read_index(path: Path) -> tuple[type[np.integer[Any]], Tokens, Tokens, Tokens]:
    """dtype, lengths i32, byte offsets i64 and document bounds i64 of an ``.idx``, mapped."""
    data = _map(path)
    if len(data) < HEADER.size:
        raise ShardError(f"{path}: {len(data)} bytes, the header alone takes {HEADER.size}: the index is cut short")
    magic, version, code, count, bounds = HEADER.unpack(data[: HEADER.size])
    if magic != MAGIC:
        raise ShardError(f"{path}: offset 0: {magic!r} is not the magic {MAGIC!r}: this is no megatron index")
    if version != 1:
        raise ShardError(f"{path}: offset 9: version {version}; only version 1 is known")
    if code not in DTYPES:
        raise ShardError(f"{path}: offset 17: dtype code {code}; token ids have one of {sorted(DTYPES)}")
    expected = HEADER.size + 12 * count + 8 * bounds
    if len(data) not in (expected, expected + count):  # multimodal indexes add one byte a sequence
        raise ShardError(
            f"{path}: {len(data)} bytes, its header describes {expected}: the index is cut short or damaged"
        )
    if not bounds:
        raise ShardError(f"{path}: offset 26: holds no documents")
    lengths = np.frombuffer(data, "<i4", count, HEADER.size)
    pointers = np.frombuffer(data, "<i8", count, HEADER.size + 4 * count)
    documents = np.frombuffer(data, "<i8", bounds, HEADER.size + 12 * count)
    return DTYPES[code], lengths, pointers, documents
