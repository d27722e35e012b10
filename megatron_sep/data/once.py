"""A split of which every sample counts once, as a validation wants it."""

from collections.abc import Sequence

import numpy as np

from megatron_sep.data.samples import Origin, Rows, Samples, SourceShare


class Once:
    """The first ``asked`` samples of another, or as many as it has before one comes again.

    A global batch that they do not fill is filled up with rows that have no weight.
    """

    def __init__(self, samples: Samples, asked: int) -> None:
        self._samples, self.asked, self.name = samples, asked, samples.name
        self.num_samples = min(asked, samples.num_distinct)

    def take(self, first_sample: int, count: int, batch: range | None = None) -> Rows:
        """Samples [first_sample, first_sample + count) of a global batch whose weights mean 1."""
        whole = range(first_sample, first_sample + count) if batch is None else batch
        real, here = self._there(whole), self._there(range(first_sample, first_sample + count))
        if len(real) == len(whole):
            return self._samples.take(first_sample, count, whole)
        filling = self._samples.take(0, 1).ids.repeat(count - len(here), 0)
        nothing = np.zeros(filling.shape, np.float32)
        if not here:
            return Rows(filling, nothing)
        ids, weights = self._samples.take(here.start, len(here), real)
        weights = np.ones(ids.shape, np.float32) if weights is None else weights
        scale = np.float32(len(whole) / len(real))
        return Rows(np.concatenate([ids, filling]), np.concatenate([weights * scale, nothing]))

    @property
    def num_distinct(self) -> int:
        """All of them."""
        return self.num_samples

    def labels(self, batch: range) -> int:
        """How many tokens the loss counts; what fills a batch up has none."""
        return self._samples.labels(self._there(batch))

    def shares(self, consumed: int) -> list[SourceShare]:
        """What each source has given of the first ``consumed`` samples."""
        return self._samples.shares(consumed)

    def origins(self, index: int) -> Sequence[Origin]:
        """Where the first T tokens of a sample are from."""
        return self._samples.origins(index)

    def notes(self) -> list[str]:
        """How many samples there are, where they are fewer than were asked for."""
        if self.num_samples == self.asked:
            return self._samples.notes()
        short = f"validation has {self.num_samples:,} sequences, {self.asked:,} were asked for: each counts once"
        return [*self._samples.notes(), short]

    def _there(self, numbers: range) -> range:
        return range(numbers.start, max(numbers.start, min(numbers.stop, self.num_samples)))
