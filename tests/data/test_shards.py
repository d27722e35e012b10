"""Shards: megatron-core's bytes, and damage that is found when a shard is opened."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_sep.data.shards import Shard, ShardError, token_dtype, write_shards

MakeShard = Callable[..., Shard]

GOLDEN_INDEX = (
    "4d4d4944494458000001000000000000000802000000000000000300000000000000050000000700000000000000000000000a0000000000"
    "0000000000000000000001000000000000000200000000000000"
)
"""Two uint16 documents of 5 and 7 tokens, the same from Pythia's writer and from megatron-core's."""


def test_the_index_has_the_golden_bytes(tmp_path: Path) -> None:
    """Byte for byte what Pythia's and megatron-core's writers write."""
    write_shards(tmp_path / "s", [np.arange(5), np.arange(7)], 50_277)
    assert (tmp_path / "s.idx").read_bytes().hex() == GOLDEN_INDEX


@pytest.mark.parametrize("vocab_size", [50_277, 70_000])
def test_megatron_core_agrees(tmp_path: Path, vocab_size: int) -> None:
    """Its builder writes the same two files, and its reader reads the same documents."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    generator = np.random.default_rng(1)
    documents = [generator.integers(0, vocab_size, size) for size in (3, 0, 1, 900, 17)]
    write_shards(tmp_path / "ours", documents, vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=token_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [read[i].tolist() for i in range(len(read))] == [d.tolist() for d in documents]
    shard = Shard.open(tmp_path / "theirs")
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == [d.tolist() for d in documents]


def test_offsets_and_documents_agree(make_shard: MakeShard) -> None:
    """document_at undoes document_start, and empty documents hold no token."""
    shard = make_shard([4, 0, 3, 1])
    assert [shard.document_start(i) for i in range(5)] == [0, 4, 4, 7, 8]
    assert [shard.document_at(i) for i in range(8)] == [0, 0, 0, 0, 2, 2, 2, 3]
    assert shard.tokens(3, 6).tolist() == [3, 4, 5]
    with pytest.raises(ShardError, match="of 8"):
        shard.tokens(3, 9)


@pytest.mark.parametrize("step", [1, 3, 7, 8])
def test_parts_read_as_if_joined(make_shard: MakeShard, step: int) -> None:
    """Any cut of the .bin, through a token too, gives the tokens of the whole."""
    whole = make_shard([5, 9, 6])
    single = whole.bin_paths[0]
    expected, data = whole.tokens(0, 20).tolist(), single.read_bytes()
    pieces = [data[i : i + step] for i in range(0, len(data), step)]
    single.unlink()
    for i, piece in enumerate(pieces):
        single.with_name(f"shard-{i:05d}-of-{len(pieces) - 1:05d}.bin").write_bytes(piece)
    parts = Shard.open(single.with_suffix(""))
    assert len(parts.bin_paths) == len(pieces)
    for start in range(20):
        for stop in range(start, 21):
            assert parts.tokens(start, stop).tolist() == expected[start:stop]


def test_a_missing_part_is_named(make_shard: MakeShard) -> None:
    """A gap in the numbers is not read over."""
    single = make_shard([5, 9, 6]).bin_paths[0]
    single.rename(single.with_name("shard-00001-of-00001.bin"))
    with pytest.raises(ShardError, match=r"missing: shard-00000-of-00001\.bin"):
        Shard.open(single.with_suffix(""))


def _set(at: int, layout: str, value: object):  # type: ignore[no-untyped-def]
    def change(data: bytes) -> bytes:
        return data[:at] + struct.pack(layout, value) + data[at + struct.calcsize(layout) :]

    return change


FAULTS = {
    "truncated .bin": (".bin", lambda data: data[:-1], "cut short or belong to another"),
    "longer .bin": (".bin", lambda data: data + b"\0\0", "cut short or belong to another"),
    "empty .bin": (".bin", lambda data: data[:0], "cut short or belong to another"),
    "truncated .idx": (".idx", lambda data: data[:-1], "its header describes"),
    "cut header": (".idx", lambda data: data[:20], "header alone"),
    "empty .idx": (".idx", lambda data: data[:0], "0 bytes"),
    "wrong magic": (".idx", _set(0, "<B", 0), "offset 0.*no megatron index"),
    "wrong version": (".idx", _set(9, "<Q", 2), "offset 9: version 2"),
    "wrong dtype code": (".idx", _set(17, "<B", 6), "offset 17: dtype code 6"),
    "other dtype": (".idx", _set(17, "<B", 4), "does not follow"),
    "no documents": (".idx", lambda data: data[:18] + struct.pack("<QQ", 0, 1) + bytes(8), "holds no documents"),
    "huge count": (".idx", _set(18, "<Q", 1 << 60), "its header describes"),
    "a length changed": (".idx", _set(34 + 4, "<i", 99), "sequence 2"),
    "a negative length": (".idx", _set(34 + 4, "<i", -1), "sequence 1"),
    "an offset beyond the end": (".idx", _set(34 + 12 + 8, "<q", 1 << 40), "sequence 1"),
    "a document bound beyond the end": (".idx", _set(34 + 36 + 24, "<q", 9), "cover sequences 0 to 9"),
    "documents out of order": (".idx", _set(34 + 36 + 8, "<q", 3), "document 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_found_at_opening(make_shard: MakeShard, fault: str) -> None:
    """Each fault is an error that names the file and the place; none is read over."""
    prefix = make_shard([5, 9, 6]).bin_paths[0].with_suffix("")
    suffix, change, message = FAULTS[fault]
    path = prefix.with_suffix(suffix)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ShardError, match=f"shard{suffix}.*{message}"):
        Shard.open(prefix)


def test_an_index_of_another_shard_is_refused(make_shard: MakeShard) -> None:
    """The sizes do not agree."""
    one, two = make_shard([5, 9, 6], "one"), make_shard([5, 9], "two")
    one.index_path.write_bytes(two.index_path.read_bytes())
    with pytest.raises(ShardError, match=r"one\.bin: 40 bytes.*describes 28"):
        Shard.open(one.index_path.with_suffix(""))


@pytest.mark.parametrize("token", [-1, 100])
def test_a_token_outside_the_vocabulary_is_not_written(tmp_path: Path, token: int) -> None:
    """The document is named and neither file appears."""
    with pytest.raises(ShardError, match=f"document 1 has token id {token}"):
        write_shards(tmp_path / "s", [[1, 2], [3, token]], 100)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    """An error while the second shard of a name is written leaves the first one, and nothing beside it."""
    first = write_shards(tmp_path / "s", [[1, 2], [3]], 100).tokens(0, 3).tolist()
    with pytest.raises(ShardError, match="document 1 has token id 100"):
        write_shards(tmp_path / "s", [[4], [100]], 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.bin", "s.idx"]
    assert Shard.open(tmp_path / "s").tokens(0, 3).tolist() == first


def test_a_kill_never_leaves_the_index_of_one_shard_beside_the_tokens_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the last renames stop, what is there is one of the two shards, or none."""
    replace, left = Path.replace, 0

    def stop(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    for renames, found in ((2, [5, 6, 7]), (1, None), (0, None)):
        left = 2
        write_shards(tmp_path / "s", [[1, 2], [3]], 100)
        left = renames
        try:
            write_shards(tmp_path / "s", [[5], [6, 7]], 100)
        except KeyboardInterrupt:
            assert renames < 2
        if found is None:
            with pytest.raises(ShardError, match=r"s\.idx: no such file"):
                Shard.open(tmp_path / "s")
        else:
            assert Shard.open(tmp_path / "s").tokens(0, 3).tolist() == found


@pytest.mark.parametrize("prefix", [".", "/"])
def test_a_prefix_is_a_name(prefix: str) -> None:
    """A folder alone names no shard, to read or to write."""
    for use in (Shard.open, lambda path: write_shards(path, [[1]], 9)):
        with pytest.raises(ShardError, match="names a folder; give the name of the files in it"):
            use(Path(prefix))


def test_missing_files_are_named(tmp_path: Path) -> None:
    """The message says which file and what data.path is."""
    with pytest.raises(ShardError, match=r"nothing\.idx: no such file; data.path"):
        Shard.open(tmp_path / "nothing")
