"""Sample order: a function of the seed and the number of the sample, nothing else."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sep.config.schema import DataConfig
from megatron_sep.data.open_data import open_samples
from megatron_sep.data.permutation import Permutation
from megatron_sep.data.samples import DataError, Samples, Split, split_documents
from megatron_sep.data.shards import Shard

MakeShard = Callable[..., Shard]


def samples(
    shard: Shard, seed: int = 1, shuffle: bool = True, split: Split = "train", vocab_size: int = 50_000
) -> Samples:
    """Windows of 7 + 1 tokens of one shard."""
    data = DataConfig(path=shard.index_path.with_suffix(""), split=(1, 0, 0), shuffle=shuffle, seed=seed)
    return open_samples(data, split, 7, vocab_size, 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32), st.integers(0, 5))
def test_a_permutation_takes_every_place_once(size: int, seed: int, epoch: int) -> None:
    """The image of [0, n) is [0, n)."""
    image = Permutation(size, seed, epoch)(np.arange(size))
    assert sorted(image.tolist()) == list(range(size))


def test_a_permutation_shuffles() -> None:
    """Seeds and epochs give orders of their own, neighbours do not stay neighbours, no trend is left."""
    index = np.arange(10_000)
    images = [Permutation(10_000, seed, epoch)(index) for seed, epoch in ((0, 0), (1, 0), (0, 1))]
    for image in images:
        assert (np.abs(np.diff(image)) == 1).mean() < 0.002
        assert abs(np.corrcoef(index, image)[0, 1]) < 0.04
        assert np.bincount(image[:5000] // 1000, minlength=10).std() < 50
    assert (images[0] == images[1]).mean() < 0.002
    assert (images[0] == images[2]).mean() < 0.002


def test_a_permutation_is_the_same_on_every_machine() -> None:
    """Golden values: a change here changes the data order of every resumed run."""
    assert Permutation(1000, 1234)(np.arange(6)).tolist() == GOLDEN


GOLDEN = [572, 932, 794, 596, 544, 729]


def test_an_epoch_reads_every_sample_once(make_shard: MakeShard) -> None:
    """The samples of an epoch are the windows [7 i, 7 i + 8) of the stream, in another order each epoch."""
    data = samples(make_shard([40, 30, 31]))
    assert data.num_samples == 14
    windows = [list(range(7 * i, 7 * i + 8)) for i in range(14)]
    for epoch in range(3):
        rows = data.take(14 * epoch, 14).ids.tolist()
        assert rows != windows
        assert sorted(rows) == windows
    assert data.take(0, 14).ids.tolist() != data.take(14, 14).ids.tolist()


def test_in_order_is_in_order(make_shard: MakeShard) -> None:
    """shuffle=False reads the stream from its start, again and again."""
    data = samples(make_shard([40, 30, 31]), shuffle=False)
    assert data.take(13, 2).ids.tolist() == [list(range(91, 99)), list(range(8))]


@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_and_resumes_do_not_change_the_samples(make_shard: MakeShard, shuffle: bool) -> None:
    """A batch is the same rows read at once, by 1, 2 or 4 ranks, and after a resume at any sample."""
    shard = make_shard([40, 30, 31])
    whole = samples(shard, shuffle=shuffle).take(0, 48).ids
    for ranks in (1, 2, 4):
        data = samples(shard, shuffle=shuffle)
        rows = [data.take(step * 8 + rank * 8 // ranks, 8 // ranks).ids for step in range(6) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(rows), whole)
    for resumed in (5, 14, 29):
        assert np.array_equal(samples(shard, shuffle=shuffle).take(resumed, 3).ids, whole[resumed : resumed + 3])


def test_splits_share_no_document() -> None:
    """Training, validation and test are consecutive ranges that hold every document once."""
    assert split_documents(1000, (0.969, 0.03, 0.001)) == (range(969), range(969, 999), range(999, 1000))
    for count in range(40):
        ranges = split_documents(count, (0.5, 0.3, 0.2))
        assert [i for documents in ranges for i in documents] == list(range(count))


def test_the_seed_changes_the_order(make_shard: MakeShard) -> None:
    """Two seeds, two orders."""
    shard = make_shard([101])
    assert samples(shard, seed=1).take(0, 14).ids.tolist() != samples(shard, seed=2).take(0, 14).ids.tolist()


def test_an_empty_split_is_refused(make_shard: MakeShard) -> None:
    """The message names the split, what it has, what it needs, and the setting."""
    shard = make_shard([40, 30, 6])
    with pytest.raises(
        DataError, match=r"valid split is 0 of 3 documents with 0 tokens, one sample takes 8.*data.split"
    ):
        samples(shard, split="valid")


def test_a_token_beyond_the_vocabulary_is_named(make_shard: MakeShard) -> None:
    """Document and offset, before the model sees it."""
    shard = make_shard([40, 30, 31])
    data = samples(shard, shuffle=False, vocab_size=45)
    assert data.take(0, 6).ids.max() == 42
    with pytest.raises(DataError, match=r"document 1, token 5 of it: token id 45 .* vocabulary of 45"):
        data.take(0, 8)
