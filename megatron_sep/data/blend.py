"""Several sources mixed by weight: which source sample i is from, and which of its samples it is, without any state."""

from collections.abc import Sequence

import numpy as np

from megatron_sep.data.samples import Ids, Rows, SourceShare, Span, Windows

PERIOD = 1 << 16
"""Samples after which the mixture repeats: shares are kept to one in 65,536."""


class Blend:
    """Samples of several sources, each source in its own order, spread evenly by the weights."""

    def __init__(self, name: str, sources: Sequence[Windows], weights: Sequence[float]) -> None:
        self.name, self.sources = name, tuple(sources)
        total = sum(weights)
        self._asked = [weight / total for weight in weights]
        self._source, self._number, self._counts = _pattern(self._asked)
        self.num_samples = sum(source.num_samples for source in sources)

    def take(self, first_sample: int, count: int, batch: range | None = None) -> Rows:
        """Samples [first_sample, first_sample + count); all their tokens count alike, whatever the ``batch``."""
        del batch
        source, number = self.locate(np.arange(first_sample, first_sample + count, dtype=np.int64))
        parts = {s: self.sources[s].at(number[source == s]) for s in np.unique(source).tolist()}
        width = next(iter(parts.values())).shape[1] if parts else 0
        ids = np.empty((count, width), np.int64)
        for s, rows in parts.items():
            ids[source == s] = rows
        return Rows(ids, None)

    @property
    def num_distinct(self) -> int:
        """Up to the first sample that its source has given before."""
        again = []
        for number, source in enumerate(self.sources):
            periods, rest = divmod(source.num_samples, int(self._counts[number]))
            again.append(periods * PERIOD + int(np.flatnonzero(self._source == number)[rest]))
        return min(again)

    def labels(self, batch: range) -> int:
        """All tokens but the first of each sample."""
        return self.sources[0].labels(batch)

    def notes(self) -> list[str]:
        """Nothing is left out."""
        return []

    def locate(self, index: Ids) -> tuple[Ids, Ids]:
        """The source of each sample of the run, and its number among that source's samples."""
        periods, within = np.divmod(index, PERIOD)
        source = self._source[within]
        return source, periods * self._counts[source] + self._number[within]

    def origins(self, index: int) -> list[Span]:
        """The documents of the first T tokens of sample ``index``, in order."""
        source, number = self.locate(np.array([index], np.int64))
        return self.sources[int(source[0])].origins(int(number[0]))

    def shares(self, consumed: int) -> list[SourceShare]:
        """What each source has given of the first ``consumed`` samples."""
        periods, rest = divmod(consumed, PERIOD)
        taken = periods * self._counts + np.bincount(self._source[:rest], minlength=len(self.sources))
        return [
            SourceShare(source.name, asked, count / max(consumed, 1), count, count / source.num_samples)
            for source, asked, count in zip(self.sources, self._asked, taken.tolist(), strict=True)
        ]


def _pattern(shares: Sequence[float]) -> tuple[Ids, Ids, Ids]:
    """One period: each place's source, its number among the places of that source, and how many places each has.

    Source s with c places wants them at (k + 1/2) / c of the period; the places are given in the order of these.
    """
    exact = np.array(shares) * PERIOD
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    while counts.sum() != PERIOD:  # the largest remainders get what rounding left, at most one a source
        step = 1 if counts.sum() < PERIOD else -1
        counts[int(np.argmax((exact - counts) * step))] += step
    source = np.repeat(np.arange(len(shares)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((number + 0.5) / counts[source], kind="stable")
    return source[order].astype(np.int64), number[order].astype(np.int64), counts
