"""Bad input is named or counted; documents in = documents kept + dropped, by reason."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_sep.prepare.text import Limits, Tally, TextError, read_documents

zstandard = pytest.importorskip("zstandard")


def line(text: object) -> bytes:
    return json.dumps({"text": text, "meta": {}}).encode() + b"\n"


GOOD = line("a document")
BAD_LINES = {
    "bad UTF-8": b'{"text": "a\xff"}\n',
    "broken JSON": b'{"text": "a\n',
    "NUL byte": b'{"text": "a\\u0000b"}\n',
    "missing field": b'{"txt": "a"}\n',
    "field is no text": b'{"text": 3}\n',
    "too long": line("x" * 3000),
    "blank": line(" \n\t"),
}
SKIP = Limits(on_bad="skip", on_blank="skip", max_bytes=1000)
FAIL = Limits(on_bad="fail", on_blank="fail", max_bytes=1000)


def read(path: Path, limits: Limits = SKIP) -> tuple[list[str], Tally]:
    tally = Tally()
    texts = [document.text for document in read_documents(path, limits, tally)]
    assert tally.read == len(texts) + tally.dropped.total()
    return texts, tally


@pytest.mark.parametrize("reason", BAD_LINES)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_bad_line_is_skipped_and_counted(tmp_path: Path, reason: str, suffix: str) -> None:
    """The lines around it are kept, and its reason is counted once."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(GOOD + BAD_LINES[reason] + GOOD, suffix))
    texts, tally = read(path)
    assert texts == ["a document"] * 2
    assert tally.dropped == {reason: 1}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_fails_with_file_and_line(tmp_path: Path, reason: str) -> None:
    """Under `fail` the message names the file, the line and the reason."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + BAD_LINES[reason] + GOOD)
    with pytest.raises(TextError, match=rf"a\.jsonl, line 2: {reason}"):
        read(path, FAIL)


def test_half_a_character_is_bad_utf8(tmp_path: Path) -> None:
    r"""JSON may hold \ud800, which no tokenizer can encode."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\ud800"}\n' + GOOD)
    assert read(path)[1].dropped == {"bad UTF-8": 1}


def test_a_line_of_100_mb_passes_in_little_memory(tmp_path: Path) -> None:
    """It is left out without being held."""
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + GOOD)
    tracemalloc.start()
    texts, tally = read(path, Limits(on_bad="skip", max_bytes=2_000_000))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert (len(texts), tally.dropped) == (2, {"too long": 1})


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_keeps_what_stands_before(tmp_path: Path, suffix: str) -> None:
    """Whole lines are kept, the rest of the file counts as one dropped document."""
    lines = b"".join(line(f"{i} {hash_text(i)}") for i in range(3000))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(lines, suffix)[:-2000])
    texts, tally = read(path)
    assert texts == [f"{i} {hash_text(i)}" for i in range(len(texts))]
    assert len(texts) > 1000
    assert tally.dropped == {"damaged file": 1}
    with pytest.raises(TextError, match=rf"a\.jsonl{suffix}, line {len(texts) + 1}: damaged file"):
        read(path, FAIL)


def test_several_zstd_frames_are_one_file(tmp_path: Path) -> None:
    """Files made by joining .zst files read to their end."""
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress(GOOD, ".zst") + compress(GOOD + GOOD, ".zst"))
    assert len(read(path)[0]) == 3


def test_garbage_in_a_compressed_file_is_counted(tmp_path: Path) -> None:
    """A file that is no zstd or gzip at all is one dropped document."""
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"no such format" * 10)
        assert read(path)[1].dropped == {"damaged file": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst"])
def test_an_empty_file_is_counted(tmp_path: Path, name: str) -> None:
    """It counts as one record, which is dropped; under `fail` it is an error."""
    path = tmp_path / name
    path.write_bytes(b"")
    assert read(path)[1].dropped == {"empty file": 1}
    with pytest.raises(TextError, match="empty file"):
        read(path, FAIL)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """Neither JSON nor plain text begins with it."""
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain")
    assert read(tmp_path / "a.jsonl")[0] == ["a document"]
    assert read(tmp_path / "a.txt")[0] == ["plain"]


def test_the_last_line_needs_no_newline(tmp_path: Path) -> None:
    """And blank lines between count as blank."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD.strip())
    texts, tally = read(path)
    assert (len(texts), tally.dropped) == (2, {"blank": 1})


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    """Null and blank rows are counted; a column of another type or name drops every row."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, " ", "two"], "n": [1, 2, 3, 4]}), path)
    texts, tally = read(path)
    assert (texts, tally.dropped) == (["one", "two"], {"field is no text": 1, "blank": 1})
    for column, reason in (("n", "field is no text"), ("other", "missing field")):
        assert read(path, Limits(field=column, on_bad="skip"))[1].dropped == {reason: 4}
    path.write_bytes(path.read_bytes()[:-10])
    assert read(path)[1].dropped == {"damaged file": 1}


def test_null_is_no_text_in_either_format(tmp_path: Path) -> None:
    """A field that holds null is there, and what it holds is no text; both formats say it in the same words."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": pa.array([None, "one"], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(line(None) + GOOD)
    for name in ("a.parquet", "a.jsonl"):
        assert read(tmp_path / name)[1].dropped == {"field is no text": 1}
        with pytest.raises(TextError, match=rf"{name}, line 1: field is no text: 'text' is null"):
            read(tmp_path / name, FAIL)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    """The message lists the formats that are known."""
    with pytest.raises(TextError, match=r"a\.csv: .*\.jsonl"):
        list(read_documents(tmp_path / "a.csv"))


def compress(data: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.ZstdCompressor().compress(data) if suffix.endswith(".zst") else data


def hash_text(i: int) -> str:
    import hashlib

    return hashlib.sha256(str(i).encode()).hexdigest()
