"""Documents out of .txt, .jsonl (.gz, .zst) and .parquet files; what cannot be read is named and counted."""

import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_sep.data.extras import needs_extra
from megatron_sep.errors import UserError
from megatron_sep.files import parse_json
from megatron_sep.prepare.places import open_bytes

Policy = Literal["fail", "skip"]

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst")
_BOM = b"\xef\xbb\xbf"
_READ = 1 << 20


class TextError(UserError):
    """Text that cannot be read, with the file and line."""


@dataclass(frozen=True)
class Limits:
    """How to read, and what to do with what cannot be read."""

    field: str = "text"
    """Key (JSON) or column (parquet) that holds the text."""
    on_bad: Policy = "fail"
    """A record that cannot be read, or has no text."""
    on_blank: Policy = "skip"
    """A document of white space alone."""
    max_bytes: int = 50_000_000
    """Longest record; a longer one is bad input."""


@dataclass(frozen=True)
class Record:
    """A document as it stands in a file, not yet looked into: its bytes, or why there are none."""

    file: Path
    line: int
    """Line of a JSON file, row of a parquet file, both from 1; 1 for a .txt."""
    data: bytes
    kind: Literal["json", "text"]
    bad: str | None = None
    detail: str = ""
    read: int = 0
    """Bytes of the file read so far, as it lies on the disk: for progress."""


@dataclass(frozen=True)
class Document:
    """A text that can be used, and where it stands; lines as in ``Record``."""

    text: str
    file: Path
    line: int


class BadRecordError(UserError):
    """Why a record is no document; ``admit`` counts it, or makes a TextError of it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}{f': {detail}' if detail else ''}")
        self.reason = reason


@dataclass
class Tally:
    """Records that were looked into, and those of them that were dropped, by reason."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def read_documents(path: Path, limits: Limits = Limits(), tally: Tally | None = None) -> Iterator[Document]:
    """The documents of a file, one at a time; ``tally`` counts them. Raises TextError under the policy ``fail``."""
    tally = Tally() if tally is None else tally
    for record in read_records(path, limits):
        text = admit(record, limits, tally)
        if text is not None:
            yield Document(text, record.file, record.line)


def admit(record: Record, limits: Limits, tally: Tally) -> str | None:
    """The record's text, or None where it is counted as dropped. Raises TextError, naming file and line."""
    tally.read += 1
    try:
        return text_of(record, limits)
    except BadRecordError as error:
        if (limits.on_blank if error.reason == "blank" else limits.on_bad) == "fail":
            key = "on_blank" if error.reason == "blank" else "on_bad"
            raise TextError(f"{record.file}, line {record.line}: {error}; {key}: skip leaves such out") from error
        tally.dropped[error.reason] += 1
        return None


def text_of(record: Record, limits: Limits) -> str:
    """The text of a record, unchanged. Raises BadRecordError."""
    if record.bad:
        raise BadRecordError(record.bad, record.detail)
    try:
        decoded = record.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError("bad UTF-8", f"byte {error.start} of it") from error
    text = decoded if record.kind == "text" else _json_text(decoded, limits.field)
    if "\0" in text:
        raise BadRecordError("NUL byte", f"character {text.index(chr(0))} of the text")
    if not text or text.isspace():
        raise BadRecordError("blank")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" in JSON is half of a character
        raise BadRecordError("bad UTF-8", f"half a character at {error.start} of the text") from error
    return text


def _json_text(line: str, key: str) -> str:
    if line.isspace():
        raise BadRecordError("blank")
    try:
        record = parse_json(line)
    except ValueError as error:
        raise BadRecordError("broken JSON", str(error)) from error
    if not isinstance(record, dict) or key not in record:
        keys = ", ".join(list(record)[:8]) if isinstance(record, dict) else type(record).__name__
        raise BadRecordError("missing field", f"no {key!r} in it, it has: {keys}")
    text = record[key]
    if not isinstance(text, str):
        raise BadRecordError(*_no_text(key, "null" if text is None else f"a {type(text).__name__}"))
    return text


def _no_text(key: str, kind: str) -> tuple[str, str]:
    """Reason and detail of a field that holds something else, in JSON as in parquet."""
    return "field is no text", f"{key!r} is {kind}"


def format_of(path: Path) -> str:
    """The suffix that tells the format, without the compression. Raises TextError for one that is not known."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSIONS]
    known = suffixes[-1] if suffixes else ""
    if known not in FORMATS:
        raise TextError(
            f"{path}: a file of text ends in {', '.join(FORMATS)}, or in these and {' or '.join(COMPRESSIONS)}"
        )
    return known


def read_records(path: Path, limits: Limits) -> Iterator[Record]:
    """The records of a file in its order, without looking into them. Memory: one record, or one parquet row group."""
    kind = format_of(path)
    read = {".txt": _whole, ".parquet": _parquet}.get(kind, _lines)
    empty = True
    for record in read(path, limits):
        empty = False
        yield record
    if empty:
        yield Record(path, 1, b"", "text", "empty file")


def _lines(path: Path, limits: Limits) -> Iterator[Record]:
    line = 0
    try:
        with open_text(path) as file:
            while raw := file.readline(limits.max_bytes + 1):
                line += 1
                too_long = len(raw) > limits.max_bytes
                while too_long and raw and not raw.endswith(b"\n"):
                    raw = file.readline(_READ)
                read = consumed(file)
                if too_long:
                    yield _too_long(path, line, limits, read)
                else:
                    yield Record(path, line, _no_bom(raw, line), "json", read=read)
    except EOFError as error:
        yield Record(path, line + 1, b"", "json", "damaged file", str(error))


def _whole(path: Path, limits: Limits) -> Iterator[Record]:
    """A .txt is one document."""
    try:
        with open_text(path) as file:
            data = file.read(limits.max_bytes + 1)
    except EOFError as error:
        yield Record(path, 1, b"", "text", "damaged file", str(error))
        return
    if len(data) > limits.max_bytes:
        yield _too_long(path, 1, limits)
    elif data:
        yield Record(path, 1, _no_bom(data, 1), "text")


def _parquet(path: Path, limits: Limits) -> Iterator[Record]:
    with needs_extra("pyarrow", "data"):
        import pyarrow
        import pyarrow.parquet
    row = 0
    try:
        with open_bytes(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            fault = _column_fault(file, limits.field)
            if fault:
                yield from (Record(path, i + 1, b"", "text", *fault) for i in range(file.metadata.num_rows))
                return
            for batch in file.iter_batches(batch_size=256, columns=[limits.field]):
                for value in batch.column(0).cast(pyarrow.large_binary()):
                    row += 1
                    yield _cell(path, row, value.as_py(), limits)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or isinstance(error, TimeoutError)):
            raise  # of the disk or the network, not of what stands in the file
        yield Record(path, row + 1, b"", "text", "damaged file", str(error))


def _column_fault(file: Any, name: str) -> tuple[str, str] | None:
    """Why no row of the file has a text: (reason, detail)."""
    names = file.schema_arrow.names
    if name not in names:
        return "missing field", f"no column {name!r}, it has: {', '.join(names[:8])}"
    kind = str(file.schema_arrow.field(name).type)
    known = ("string", "large_string", "binary", "large_binary")
    return None if kind in known else ("field is no text", f"column {name!r} is {kind}")


def _cell(path: Path, row: int, value: bytes | None, limits: Limits) -> Record:
    if value is None:
        return Record(path, row, b"", "text", *_no_text(limits.field, "null"))
    return _too_long(path, row, limits) if len(value) > limits.max_bytes else Record(path, row, value, "text")


def _too_long(path: Path, line: int, limits: Limits, read: int = 0) -> Record:
    return Record(path, line, b"", "text", "too long", f"more than max_bytes={limits.max_bytes}", read)


def _no_bom(data: bytes, line: int) -> bytes:
    return data.removeprefix(_BOM) if line == 1 else data


def open_text(path: Path) -> BinaryIO:
    """The file's bytes, decompressed by its suffix; buffered."""
    if path.suffix in COMPRESSIONS:
        decoder = _zstd_decoder() if path.suffix == ".zst" else partial(zlib.decompressobj, wbits=31)
        return io.BufferedReader(_Frames(open_bytes(path), decoder), _READ)
    return open_bytes(path)


def consumed(file: BinaryIO) -> int:
    """Bytes of the file on disk that have been read."""
    raw = getattr(file, "raw", None)
    return raw.consumed if isinstance(raw, _Frames) else file.tell()


def _zstd_decoder() -> Callable[[], Any]:
    with needs_extra("zstandard", "data"):
        from zstandard import ZstdDecompressor
    decoder: Callable[[], Any] = ZstdDecompressor(max_window_size=1 << 31).decompressobj
    return decoder


class _Frames(io.RawIOBase):
    """Every frame of a compressed file. It hands out all that stands before damage, as the libraries do not."""

    def __init__(self, file: BinaryIO, decoder: Callable[[], Any]) -> None:
        self._file, self._decoder, self._frame = file, decoder, decoder()
        self._ready, self._inside = memoryview(b""), False
        self.consumed = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._fill():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _fill(self) -> bool:
        """Decode one more piece; False at the end. Raises EOFError for an end inside a frame, or for damage."""
        rest = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame, self._inside = self._decoder(), False
        data = rest or self._file.read(_READ >> 3)
        self.consumed += 0 if rest else len(data)
        if not data:
            if self._inside:
                raise EOFError("it ends before its compressed data does")
            return False
        self._inside = True
        try:
            self._ready = memoryview(self._frame.decompress(data))
        except Exception as error:  # zlib.error, zstandard.ZstdError: two libraries, no common class
            raise EOFError(str(error)) from error
        return True
