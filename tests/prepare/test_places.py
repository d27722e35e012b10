"""Text at addresses is the text at paths, and a shard is copied to one."""

import errno
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.bucket import served_bucket

from megatron_sep.config.prepare import PrepareConfig, TextSourceConfig
from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.files import sha256
from megatron_sep.prepare import text
from megatron_sep.prepare.places import PlaceError
from megatron_sep.prepare.prepare import prepare
from megatron_sep.prepare.readings import expand
from megatron_sep.prepare.receipt import PrepareError
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


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with served_bucket(monkeypatch) as address:
        yield address


def lines_at(folder: str, system: Any, files: int = 2) -> None:
    for number in range(files):
        texts = (json.dumps({"text": f"text {number} {n}"}) + "\n" for n in range(40))
        system.pipe_file(f"{folder}/{number}.jsonl", "".join(texts).encode())


def test_text_from_s3_and_the_shard_to_it(bucket: str, tmp_path: Path, tokenizer_path: Path) -> None:
    """Read by globs, written with its receipt last; done already it is left, and what is another's is refused."""
    system = fsspec.filesystem("s3")
    lines_at("bucket/text", system)
    system.get("bucket/text/", str(tmp_path / "text") + "/", recursive=True)
    settings: dict[str, Any] = {"tokenizer": TokenizerConfig(path=tokenizer_path), "workers": 1}
    here = prepare(
        PrepareConfig(output=tmp_path / "here", sources=(TextSourceConfig(paths=(f"{tmp_path}/text",)),), **settings)
    )
    settings |= {"sources": (TextSourceConfig(paths=(f"{bucket}/text/*.jsonl",)),), "upload": f"{bucket}/shards/"}
    config = PrepareConfig(output=tmp_path / "there", **settings)
    made = prepare(config)
    assert prepare(config) == made
    assert made["tokens"] == here["tokens"]
    for suffix in (".bin", ".idx", ".manifest.json"):
        assert system.cat_file(f"bucket/shards/there{suffix}") == (tmp_path / f"there{suffix}").read_bytes()
    assert system.cat_file("bucket/shards/there.bin") == (tmp_path / "here.bin").read_bytes()
    with pytest.raises(PrepareError, match=r"there\.manifest\.json is there already and is not of this shard"):
        prepare(PrepareConfig(output=tmp_path / "other" / "there", **settings, shuffle=True))
    assert not (tmp_path / "other").exists()


def test_an_upload_goes_on_and_overwrites_nothing(tmp_path: Path, tokenizer_path: Path) -> None:
    """What a killed run has copied is taken when it is whole; half of a file is named, and nothing is after it."""
    system = fsspec.filesystem("memory")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    sources = (TextSourceConfig(paths=(str(tmp_path / "a.jsonl"),)),)
    settings: dict[str, Any] = {"tokenizer": TokenizerConfig(path=tokenizer_path), "sources": sources, "workers": 1}
    prepare(PrepareConfig(output=tmp_path / "a", **settings))
    config = PrepareConfig(output=tmp_path / "a", upload="memory://up/shards", **settings)
    system.put_file(str(tmp_path / "a.bin"), "/up/shards/a.bin")
    system.pipe_file("/up/shards/a.idx", (tmp_path / "a.idx").read_bytes()[:-1])
    with pytest.raises(PrepareError, match=r"a\.idx is there already and is not of this shard, or half of it"):
        prepare(config)
    assert not system.exists("/up/shards/a.manifest.json")
    system.rm("/up/shards/a.idx")
    prepare(config)
    for suffix in (".bin", ".idx", ".manifest.json"):
        assert system.cat_file(f"/up/shards/a{suffix}") == (tmp_path / f"a{suffix}").read_bytes()
    system.rm("/up", recursive=True)


def test_what_is_no_place_to_copy_to_is_refused_before_the_work(tmp_path: Path, tokenizer_path: Path) -> None:
    """A path, and a file system that nobody knows."""
    (tmp_path / "a.txt").write_text("a")
    sources = (TextSourceConfig(paths=(str(tmp_path / "a.txt"),)),)
    settings: dict[str, Any] = {"tokenizer": TokenizerConfig(path=tokenizer_path), "sources": sources}
    with pytest.raises(ValidationError, match="shards: is no address such as s3://bucket/shards"):
        PrepareConfig(output=tmp_path / "out", upload="shards", **settings)
    with pytest.raises(PlaceError, match="nosuch://shards: ValueError: Protocol not known: nosuch"):
        prepare(PrepareConfig(output=tmp_path / "out", upload="nosuch://shards", **settings))
    assert not (tmp_path / "out.work").exists()


def test_a_network_that_fails_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parquet file of which the rest could not be read is not taken for one that ends there."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"] * 9}), path)

    class Lost(io.BytesIO):
        def read(self, _: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "the network is gone")

    monkeypatch.setattr(text, "open_bytes", lambda _: Lost(path.read_bytes()))
    with pytest.raises(OSError, match="the network is gone"):
        list(read_documents(path, Limits(on_bad="skip")))
