"""Text at addresses is the text at paths."""

import gzip
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_sep.config.prepare import PrepareConfig, TextSourceConfig
from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.files import sha256
from megatron_sep.prepare.places import PlaceError
from megatron_sep.prepare.prepare import prepare
from megatron_sep.prepare.readings import expand
from megatron_sep.prepare.text import Limits, TextError, read_documents

pytest.importorskip("upath", reason="needs the extra remote; pip install megatron_sep[remote]")
fsspec = pytest.importorskip("fsspec")


def test_every_format_is_read_from_memory(tmp_path: Path) -> None:
    """fsspec's memory: folders and globs name files, and the same documents, sizes and sums come out of them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"document {number}" for number in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.txt").write_text("whole")
    (tmp_path / "d.csv").write_text("no text")
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "deep.parquet")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path) + "/", "/bucket/text/", recursive=True)
    files = expand(["memory://bucket/text"], "key")
    assert [file.name for file in files] == ["a.jsonl", "b.jsonl.gz", "c.txt", "deep.parquet"]
    assert [file.name for file in expand(["memory://bucket/*/*.jsonl*"], "key")] == ["a.jsonl", "b.jsonl.gz"]
    for file in files:
        here = tmp_path / file.name
        assert [d.text for d in read_documents(file, Limits())] == [d.text for d in read_documents(here, Limits())]
        assert sha256(file) == sha256(here)
    with pytest.raises(TextError, match=r"key: memory://bucket/none: no file of text there"):
        expand(["memory://bucket/none"], "key")
    with pytest.raises(PlaceError, match=r"nosuch://a: .*nosuch"):
        expand(["nosuch://a"], "key")


def test_the_shard_of_addresses_is_that_of_paths(tmp_path: Path, tokenizer_path: Path) -> None:
    """Byte for byte, through worker processes; an output must be a path."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {n}"}) + "\n" for n in range(99)))
    for output, place in (("one", f"{tmp_path}/*.jsonl"), ("two", f"file://{tmp_path}/*.jsonl")):
        section, sources = TokenizerConfig(path=tokenizer_path), (TextSourceConfig(paths=(place,)),)
        made = prepare(PrepareConfig(output=tmp_path / output, tokenizer=section, sources=sources, workers=1))
        assert made["documents"]["written"] == 99
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    with pytest.raises(ValidationError, match="s3://bucket/out: a shard grows on a disk that all who work on it see"):
        PrepareConfig(output="s3://bucket/out", tokenizer=section, sources=sources)  # type: ignore[arg-type]
