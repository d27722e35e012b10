"""Validation reads every sequence once, whatever was asked for, and its mean is over tokens."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_sep.config import RunConfig
from megatron_sep.data.blend import Blend
from megatron_sep.data.once import Once
from megatron_sep.data.samples import Rows, SourceShare
from megatron_sep.parallel.groups import topology
from megatron_sep.train.written import read_jsonl

LENGTH = 4


class Numbers:
    """``size`` samples whose tokens are their number, over and over; every third learns half of its tokens."""

    name = "numbers"

    def __init__(self, size: int, weighted: bool) -> None:
        self.num_samples = self.num_distinct = size
        self.weighted = weighted

    def take(self, first_sample: int, count: int, batch: range | None = None) -> Rows:
        ids = np.repeat(np.arange(first_sample, first_sample + count)[:, None] % self.num_samples, LENGTH + 1, 1)
        if not self.weighted:
            return Rows(ids, None)
        whole = batch or range(first_sample, first_sample + count)
        mean = self.labels(whole) / (len(whole) * LENGTH)
        return Rows(ids, (self._learnt(range(first_sample, first_sample + count)) / mean).astype(np.float32))

    def labels(self, batch: range) -> int:
        return int(self._learnt(batch)[:, 1:].sum()) if self.weighted else len(batch) * LENGTH

    def _learnt(self, batch: range) -> np.ndarray:
        return np.array([[1, 1, 1, number % 3 > 0, number % 3 > 0] for number in batch], np.float32).reshape(
            -1, LENGTH + 1
        )

    def shares(self, consumed: int) -> list[SourceShare]:
        return [SourceShare(self.name, 1.0, 1.0, consumed, consumed / self.num_samples)]

    def origins(self, _: int) -> list[object]:
        return []

    def notes(self) -> list[str]:
        return []


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("size", "asked", "batch"), [(5, 12, 4), (8, 8, 4), (3, 40, 8), (7, 100, 3), (20, 12, 4)])
def test_the_mean_over_batches_is_the_mean_over_tokens(weighted: bool, size: int, asked: int, batch: int) -> None:
    """Batches weighted by their tokens give the mean of a loss that is any function of the sequence."""
    once, loss = Once(Numbers(size, weighted), asked), np.random.default_rng(0).random(size)
    assert once.num_samples == min(size, asked)
    total = tokens = 0.0
    seen = []
    for first in range(0, once.num_samples, batch):
        numbers = range(first, first + batch)
        halves = [once.take(part, batch // 2 or 1, numbers) for part in range(first, first + batch, batch // 2 or 1)]
        ids = np.concatenate([half.ids for half in halves])[:batch]
        weights = [np.ones(half.ids.shape, np.float32) if half.weights is None else half.weights for half in halves]
        weight = np.concatenate(weights)[:batch, 1:]
        assert weight.mean() == pytest.approx(1, rel=1e-5)
        seen += [int(row[0]) for row, w in zip(ids, weight, strict=True) if w.any()]
        total += float((loss[ids[:, 1:]] * weight).mean()) * once.labels(numbers)
        tokens += once.labels(numbers)
    assert seen == list(range(min(size, asked)))
    numbers = range(min(size, asked))
    learnt = Numbers(size, weighted)._learnt(numbers)[:, 1:] if weighted else np.ones((len(numbers), LENGTH))
    assert tokens == learnt.sum()
    assert total / tokens == pytest.approx(
        float((loss[list(numbers)][:, None] * learnt).sum() / learnt.sum()), rel=1e-5
    )


def test_reading_on_past_the_end_has_no_weight() -> None:
    """What is read ahead of the last batch counts nothing."""
    ids, weights = Once(Numbers(5, False), 8).take(8, 4, range(8, 12))
    assert ids.shape == (4, LENGTH + 1)
    assert weights is not None
    assert not weights.any()


def test_a_blend_ends_before_a_source_begins_again() -> None:
    """Of 5 and 100 sequences mixed half and half, ten are distinct."""
    blend = Blend("b", [Numbers(5, False), Numbers(100, False)], [1.0, 1.0])  # type: ignore[list-item]
    assert blend.num_distinct in (10, 11)
    sources, numbers = blend.locate(np.arange(blend.num_distinct + 1))
    places = list(zip(sources.tolist(), (numbers % np.array([5, 100])[sources]).tolist(), strict=True))
    assert len(set(places[:-1])) == blend.num_distinct
    assert places[-1] in places[:-1]


@pytest.mark.usefixtures("single_process")
def test_a_run_validates_each_sequence_once_and_says_how_many(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """More asked for than there is: the loss is the mean over the split, computed one sequence at a time."""
    from megatron_sep.train.loop import validate
    from megatron_sep.train.microbatch import Microbatch
    from megatron_sep.train.run import build_run

    config = tiny(train={"eval_batches": 50, "micro_batch_size": 4}, data={"split": [0.92, 0.08, 0]})
    run = build_run(config, topology())
    assert run.valid_data is not None
    samples = run.valid_data.samples
    assert samples.num_samples < 400
    assert samples.num_samples % 8
    said = f"validation has {samples.num_samples} sequences, 400 were asked for: each counts once"
    assert said in capsys.readouterr().out
    validate(run)
    (line,) = read_jsonl(run.config.dir / "metrics.jsonl")
    assert line["valid/tokens"] == samples.num_samples * 64
    rules = run.valid_data.rules(1)
    rows = torch.from_numpy(samples.take(0, samples.num_samples).ids)
    singles = [Microbatch.of(row[None], rules, torch.device("cpu")) for row in rows]
    losses = [float(run.engine.evaluate([one], 1)) for one in singles]
    assert line["valid/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
