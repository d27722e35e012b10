"""Blends, the Pile as published, and GPT-NeoX's order: the expected sample numbers, stated another way."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_sep.config.schema import DataConfig, ShardConfig
from megatron_sep.data.blend import PERIOD, Blend, _pattern
from megatron_sep.data.open_data import open_samples
from megatron_sep.data.pile import JOINED, join, read_checksums, split, summary, verify
from megatron_sep.data.samples import DataError
from megatron_sep.data.shards import Shard, ShardError

MakeShard = Callable[..., Shard]


def samples(num_samples: int = 1, length: int = 7, **section: Any) -> Any:
    return open_samples(DataConfig(**{"split": (1, 0, 0), **section}), "train", length, 50_000, num_samples)


def prefix(shard: Shard) -> Path:
    return shard.index_path.with_suffix("")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_a_blend_keeps_its_shares_all_the_way(weights: list[float]) -> None:
    """After any number of samples no source is more than its number of sources away from what was asked."""
    shares = np.array(weights) / sum(weights)
    source, number, counts = _pattern(shares.tolist())
    assert counts.sum() == PERIOD
    taken = (source[:, None] == np.arange(len(weights))).cumsum(0)
    asked = np.arange(1, PERIOD + 1)[:, None] * shares
    assert np.abs(taken - asked).max() <= len(weights)
    for s in range(len(weights)):
        assert (number[source == s] == np.arange(counts[s])).all()


def test_a_blend_reads_each_source_in_its_own_order(make_shard: MakeShard) -> None:
    """Sources at 3 to 1: their samples come in order, none left out, and the report gives shares and epochs."""
    one, two = make_shard([101], "one"), make_shard([71], "two", first=1000)
    blend = samples(
        blend=(ShardConfig(path=prefix(one), weight=3), ShardConfig(path=prefix(two), weight=1)), shuffle=False
    )
    rows = blend.take(0, 400).ids
    first = rows[rows[:, 0] < 1000][:, 0] // 7
    second = (rows[rows[:, 0] >= 1000][:, 0] - 1000) // 7
    assert first.tolist() == [i % 14 for i in range(300)]
    assert second.tolist() == [i % 10 for i in range(100)]
    assert [(s.name, s.asked, s.given, s.samples, s.epochs) for s in blend.shares(400)] == [
        ("one", 0.75, 0.75, 300, 300 / 14), ("two", 0.25, 0.25, 100, 10.0),
    ]  # fmt: skip


def test_a_blend_is_the_same_on_any_ranks_and_after_any_resume(make_shard: MakeShard) -> None:
    """Reading 4 x 3 samples a step, or one at a time from anywhere, gives the rows of one reading."""
    shards = (make_shard([300], "one"), make_shard([500], "two", first=10_000))
    section = {"blend": tuple(ShardConfig(path=prefix(s), weight=w) for s, w in zip(shards, (0.3, 0.7), strict=True))}
    whole = samples(**section).take(0, 120).ids
    by_rank = [samples(**section).take(12 * step + 3 * rank, 3).ids for step in range(10) for rank in range(4)]
    assert np.array_equal(np.concatenate(by_rank), whole)
    again = samples(**section)
    assert all(np.array_equal(again.take(i, 1).ids[0], whole[i]) for i in (0, 17, 60, 119))
    far = samples(**section).take(PERIOD - 2, 4).ids
    assert np.array_equal(far[2:], samples(**section).take(PERIOD, 2).ids)


def test_pythias_order_is_the_sequences_in_order(make_shard: MakeShard) -> None:
    """Batch k of the pre-shuffled set is sequences [4 k, 4 (k + 1)), each of sequence_length + 1 tokens."""
    shard = make_shard([8] * 20)
    data = samples(path=prefix(shard), order="sequences", shuffle=False)
    assert data.num_samples == 20
    for k in range(5):
        assert data.take(4 * k, 4).ids.tolist() == [shard.document(i).tolist() for i in range(4 * k, 4 * k + 4)]
    with pytest.raises(DataError, match=r"sequences of sequence_length \+ 1 = 9 tokens; the first has 8"):
        samples(path=prefix(shard), order="sequences", shuffle=False, length=8)


def brute_neox(lengths: list[int], length: int, num_samples: int, seed: int) -> list[list[int]]:
    """GPT-NeoX's construction, token by token: shuffle the documents of all epochs, cut, shuffle the samples."""
    starts = np.cumsum([0, *lengths])
    epochs = 1
    while (epochs * sum(lengths) - 1) // length < num_samples:
        epochs += 1
    generator = np.random.RandomState(seed)
    documents = np.array(list(range(len(lengths))) * epochs, dtype=np.int32)
    generator.shuffle(documents)
    stream = [t for d in documents for t in range(starts[d], starts[d + 1])]
    order = np.arange((len(stream) - 1) // length, dtype=np.uint32)
    generator.shuffle(order)
    return [stream[k * length : k * length + length + 1] for k in order]


@pytest.mark.parametrize("num_samples", [1, 14, 15, 60])
def test_the_neox_order_is_gpt_neox_s(make_shard: MakeShard, tmp_path: Path, num_samples: int) -> None:
    """The same samples as a token-by-token construction, over one and over several epochs, cached or not."""
    lengths = [3, 20, 1, 0, 33, 7, 12, 25]
    wanted = brute_neox(lengths, 7, num_samples, 1234)
    section = {"path": prefix(make_shard(lengths)), "order": "neox"}
    for extra in ({}, {"cache": tmp_path / "cache"}, {"cache": tmp_path / "cache"}):
        data = samples(num_samples, **section, **extra)
        assert data.take(0, len(wanted)).ids.tolist() == wanted
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_the_margin_of_the_neox_order_shuffles_more_epochs(make_shard: MakeShard) -> None:
    """14 samples fill an epoch; asked for half a percent more, as train_data_paths does, GPT-NeoX shuffles two."""
    lengths = [3, 20, 1, 0, 33, 7, 12, 25]
    section = {"path": prefix(make_shard(lengths)), "order": "neox"}
    for margin, asked in ((1.0, 14), (1.005, 15)):
        data = samples(14, **section, epoch_margin=margin)
        assert data.take(0, 14).ids.tolist() == brute_neox(lengths, 7, asked, 1234)[:14]


def test_the_neox_cut_is_that_of_megatron_core(make_shard: MakeShard) -> None:
    """megatron-core's compiled sample index, for the same documents, starts every sample at the same token."""
    from megatron.core.datasets import helpers

    lengths = [3, 20, 1, 33, 7, 12, 25]
    data = samples(29, path=prefix(make_shard(lengths)), order="neox")
    generator = np.random.RandomState(1234)
    documents = np.tile(np.arange(len(lengths), dtype=np.int32), 3)
    generator.shuffle(documents)
    index = helpers.build_sample_idx(np.array(lengths, np.int32), documents, 7, 3, sum(lengths))
    order = np.arange(len(index) - 1, dtype=np.uint32)
    generator.shuffle(order)
    starts = np.cumsum([0, *lengths])
    wanted = [starts[documents[index[k][0]]] + index[k][1] for k in order]
    firsts = data.take(0, len(order)).ids[:, 0]
    lasts = np.cumsum(lengths) - 1  # a sample that begins at the end of a document may be told as the next one's start
    assert all(a == b or b - 1 in lasts for a, b in zip(firsts, wanted, strict=True))
    assert (firsts == wanted).mean() > 0.8


def test_validation_is_read_in_order(make_shard: MakeShard) -> None:
    """Whatever the order of training is."""
    path = prefix(make_shard([10] * 40))
    for section in ({}, {"order": "neox"}):
        data = DataConfig(path=path, split=(0.5, 0.5, 0), **section)
        assert open_samples(data, "valid", 7, 50_000, 1).take(0, 3).ids[:, 0].tolist() == [200, 207, 214]


def test_a_data_section_names_one_source() -> None:
    """A path, or a blend: neither and both are refused, as is an order that contradicts itself."""
    for wrong in ({}, {"path": "a", "blend": [{"path": "b"}]}, {"path": "a", "order": "neox", "shuffle": False}):
        with pytest.raises(ValidationError):
            DataConfig(**wrong)  # type: ignore[arg-type]


def test_cutting_and_joining_are_each_other_s_opposite(make_shard: MakeShard, tmp_path: Path) -> None:
    """Parts of 7 bytes, through tokens and documents: read in place, verified, joined to the same bytes."""
    whole = make_shard([5, 90, 6])
    parts = split(prefix(whole), tmp_path / "cut" / "shard", 7)
    assert [p.stat().st_size for p in parts] == [7] * 28 + [6]
    cut = Shard.open(tmp_path / "cut" / "shard")
    assert cut.tokens(0, 101).tolist() == whole.tokens(0, 101).tolist()
    report = verify(tmp_path / "cut" / "shard", tmp_path / "cut" / "shard.sha256")
    assert (report.wrong, report.documents, report.tokens) == ((), 3, 101)
    assert [check.name for check in report.unknown] == ["shard.bin"]
    total = join(tmp_path / "cut" / "shard", tmp_path / "joined" / "shard")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"joined/shard{suffix}").read_bytes() == whole.index_path.with_suffix(suffix).read_bytes()
    assert total == report.unknown[0].sha256
    with pytest.raises(ShardError, match="is there already"):
        join(tmp_path / "cut" / "shard", tmp_path / "joined" / "shard")


def test_a_set_that_cannot_be_joined_leaves_nothing(
    make_shard: MakeShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle is an error that names the file; a second try goes through."""
    from megatron_sep.data import pile

    whole, pieces = make_shard([5, 90, 6]), pile._pieces

    def full(shard: Shard) -> Iterator[bytes]:
        yield from pieces(shard)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pile, "_pieces", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/joined/shard\.bin'"):
        join(prefix(whole), tmp_path / "joined" / "shard")
    assert list((tmp_path / "joined").iterdir()) == []
    monkeypatch.undo()
    join(prefix(whole), tmp_path / "joined" / "shard")
    assert Shard.open(tmp_path / "joined" / "shard").num_tokens == 101


def test_a_changed_byte_is_found_by_its_part(make_shard: MakeShard, tmp_path: Path) -> None:
    """The report names the part, what its sum is and what it should be."""
    split(prefix(make_shard([50, 60])), tmp_path / "cut" / "shard", 100)
    part = tmp_path / "cut" / "shard-00001-of-00002.bin"
    part.write_bytes(b"\1" + part.read_bytes()[1:])
    wrong = verify(tmp_path / "cut" / "shard", tmp_path / "cut" / "shard.sha256").wrong
    assert [check.name for check in wrong] == [part.name]
    assert wrong[0].sha256 != wrong[0].expected
    text = summary(verify(tmp_path / "cut" / "shard", tmp_path / "cut" / "shard.sha256"))
    assert f"WRONG                    100  {wrong[0].sha256}  {part.name}" in text
    assert "1 wrong, 1 without a checksum" in text


def test_the_published_names_and_sum_are_known(make_shard: MakeShard, tmp_path: Path) -> None:
    """A joined file under the name of the deduplicated Pile is held against EleutherAI's sum."""
    name = "pile_0.87_deduped_text_document"
    make_shard([5], name)
    wrong = verify(tmp_path / name).wrong
    assert [(check.name, check.expected) for check in wrong] == [(f"{name}.bin", JOINED[name])]
    split(tmp_path / name, tmp_path / "cut" / name, 3)
    assert len(Shard.open(tmp_path / "cut" / name).bin_paths) == 4


def test_a_checksum_file_is_read_strictly(tmp_path: Path) -> None:
    """A line that is no sum is named, as is a file that is missing."""
    path = tmp_path / "sums"
    with pytest.raises(ShardError, match="sums: no such file"):
        read_checksums(path)
    path.write_text(f"{'a' * 64} *x.bin\n# note\n\nnonsense\n")
    with pytest.raises(ShardError, match=r"sums, line 4: 'nonsense'"):
        read_checksums(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ShardError, match=r"sums, line 1: .* is no sha256"):
        read_checksums(path)
    path.write_text(f"{'a' * 64} *x.bin\n")
    assert read_checksums(path) == {"x.bin": "a" * 64}


def test_a_named_file_that_is_missing_is_an_error(make_shard: MakeShard, tmp_path: Path) -> None:
    """A set of parts with one gone is not verified as whole."""
    shard = make_shard([5, 6])
    (tmp_path / "sums").write_text(f"{'a' * 64}  shard-00000-of-00001.bin\n")
    with pytest.raises(ShardError, match=r"names files that are not in .*shard-00000-of-00001"):
        verify(prefix(shard), tmp_path / "sums")


def test_a_blend_of_one_source_is_that_source(make_shard: MakeShard) -> None:
    """The mixture adds nothing to a single source."""
    shard = make_shard([101])
    blend = samples(blend=(ShardConfig(path=prefix(shard)),))
    assert isinstance(blend, Blend)
    assert np.array_equal(blend.take(0, 30).ids, samples(path=prefix(shard)).take(0, 30).ids)
