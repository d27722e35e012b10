"""Which tokens sample i holds: a function of (seed, i) alone, whatever the number of ranks and of resumes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_sep.data.permutation import Permutation
from megatron_sep.data.shards import Shard
from megatron_sep.errors import UserError

Ids = npt.NDArray[np.int64]
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class DataError(UserError):
    """Data that cannot be trained on as asked."""


class Rows(NamedTuple):
    """Samples as the trainer takes them."""

    ids: Ids
    """int64 [rows, T + 1]"""
    weights: npt.NDArray[np.float32] | None
    """Factor of each token in the loss, [rows, T + 1], where the labels of a whole global batch mean 1; None: all
    tokens count alike."""


class Samples(Protocol):
    """What the trainer reads from. Ranks of one data-parallel group each take their rows of the same numbers."""

    name: str
    num_samples: int
    """Samples of one epoch."""

    @property
    def num_distinct(self) -> int:
        """So many samples from the first on, no place of the data is read twice."""
        ...

    def take(self, first_sample: int, count: int, batch: range | None = None) -> Rows:
        """Samples [first_sample, first_sample + count), counted from the start of the run.

        ``batch``: the numbers of the global batch that they are of, whose weights mean 1; None: they are all of it.
        """
        ...

    def labels(self, batch: range) -> int:
        """How many tokens of these samples the loss counts."""
        ...

    def shares(self, consumed: int) -> "list[SourceShare]":
        """What each source has given of the first ``consumed`` samples."""
        ...

    def notes(self) -> list[str]:
        """What became of the data when it was opened, for the user: nothing where nothing was left out."""
        ...

    def origins(self, index: int) -> "Sequence[Origin]":
        """Where the first T tokens of sample ``index`` are from, in order."""
        ...


class Origin(Protocol):
    """Some tokens of a sample that are from one place; as text, it names the place."""

    @property
    def tokens(self) -> int:
        """How many."""
        ...

    def record(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        ...


@dataclass(frozen=True)
class SourceShare:
    """What one source has given of a run so far."""

    name: str
    asked: float
    """Share of the samples by the weights."""
    given: float
    """Share of the samples that were taken."""
    samples: int
    epochs: float
    """Passes over the source's own samples."""


class Stream(Protocol):
    """Documents as one run of tokens."""

    num_tokens: int

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens [start, stop) of the stream."""
        ...

    def spans(self, start: int, stop: int) -> "list[Span]":
        """The documents that tokens [start, stop) are from, in order."""
        ...


@dataclass(frozen=True)
class Span:
    """A run of tokens of one document."""

    shard: Shard
    document: int
    offset: int
    """Of its first token in the document."""
    tokens: int

    def __str__(self) -> str:
        return f"{self.shard.bin_paths[0]}: document {self.document}, token {self.offset} of it"

    def record(self) -> dict[str, Any]:
        index = str(self.shard.index_path)
        return {"index": index, "document": self.document, "offset": self.offset, "tokens": self.tokens}


class Order(Protocol):
    """Which place of the stream sample i of the run is, for an array of i."""

    def __call__(self, index: Ids) -> Ids: ...


def split_documents(num_documents: int, shares: Sequence[float]) -> tuple[range, ...]:
    """Contiguous ranges of documents, one a share, rounded as GPT-NeoX rounds them."""
    total = sum(shares)
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / total * num_documents))
    excess = bounds[-1] - num_documents
    bounds = [0, *(max(0, bound - excess) for bound in bounds[1:])]
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


class DocumentRange:
    """Consecutive documents of a shard, in their order."""

    def __init__(self, shard: Shard, documents: range) -> None:
        self.shard, self.documents = shard, documents
        self._start = shard.document_start(documents.start)
        self.num_tokens = shard.document_start(documents.stop) - self._start

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self.shard.tokens(self._start + start, self._start + stop)

    def spans(self, start: int, stop: int) -> list[Span]:
        return spans_in(self.shard, self._start + start, self._start + stop)


def spans_in(shard: Shard, start: int, stop: int) -> list[Span]:
    """The documents that hold tokens [start, stop) of a shard; empty documents are left out."""
    found = []
    while start < stop:
        document = shard.document_at(start)
        end = min(stop, shard.document_start(document + 1))
        found.append(Span(shard, document, start - shard.document_start(document), end - start))
        start = end
    return found


@dataclass(frozen=True)
class Shuffled:
    """Each epoch goes through all samples in an order of its own."""

    size: int
    seed: int

    def __call__(self, index: Ids) -> Ids:
        epochs, within = np.divmod(index, self.size)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            within[here] = _permutation(self.size, self.seed, int(epoch))(within[here])
        return within


@dataclass(frozen=True)
class InOrder:
    """Each epoch goes through all samples from the first to the last."""

    size: int

    def __call__(self, index: Ids) -> Ids:
        return index % self.size


@lru_cache(maxsize=64)
def _permutation(size: int, seed: int, epoch: int) -> Permutation:
    return Permutation(size, seed, epoch)


class Windows:
    """Samples cut from a stream: sample k of it is ``length`` tokens from ``k * stride``.

    ``epochs`` is how often the stream holds each document.
    """

    def __init__(
        self, name: str, stream: Stream, order: Order, *, length: int, stride: int, vocab_size: int, epochs: int = 1
    ) -> None:
        self.name, self._stream, self._order = name, stream, order
        self._length, self._stride, self._vocab_size = length, stride, vocab_size
        self.num_samples = num_windows(stream.num_tokens, length, stride) // epochs

    def take(self, first_sample: int, count: int, batch: range | None = None) -> Rows:
        """Samples [first_sample, first_sample + count); all their tokens count alike, whatever the ``batch``."""
        del batch
        return Rows(self.at(np.arange(first_sample, first_sample + count, dtype=np.int64)), None)

    @property
    def num_distinct(self) -> int:
        """All of an epoch."""
        return self.num_samples

    def labels(self, batch: range) -> int:
        """All tokens but the first of each sample."""
        return len(batch) * (self._length - 1)

    def notes(self) -> list[str]:
        """Nothing is left out."""
        return []

    def at(self, indices: Ids) -> Ids:
        """The samples of these numbers: int64 [len(indices), length].

        Raises DataError for a token id that the vocabulary does not have, naming the document and the offset.
        """
        ids = np.empty((len(indices), self._length), np.int64)
        for row, start in zip(ids, self.positions(indices).tolist(), strict=True):
            row[:] = self._stream.tokens(start, start + self._length)
        if ids.size and (int(ids.max()) >= self._vocab_size or int(ids.min()) < 0):
            self._refuse(indices, ids)
        return ids

    def positions(self, indices: Ids) -> Ids:
        """Offset in the stream of the first token of each sample."""
        return self._order(indices) * self._stride

    def origins(self, index: int) -> list[Span]:
        """The documents of the first T tokens of sample ``index``, in order."""
        start = int(self.positions(np.array([index], np.int64))[0])
        return self._stream.spans(start, start + self._length - 1)

    def shares(self, consumed: int) -> list[SourceShare]:
        """All of the samples are from this source."""
        return [SourceShare(self.name, 1.0, 1.0, consumed, consumed / self.num_samples)]

    def _refuse(self, indices: Ids, ids: Ids) -> None:
        row, column = (int(x) for x in np.argwhere((ids >= self._vocab_size) | (ids < 0))[0])
        start = int(self.positions(indices[row : row + 1])[0])
        place = self._stream.spans(start + column, start + column + 1)[0]
        raise DataError(
            f"{place}: token id {ids[row, column]} is not in the vocabulary of {self._vocab_size}: "
            "the shard was made with another tokenizer, or is damaged"
        )


def num_windows(num_tokens: int, length: int, stride: int) -> int:
    """How many windows of ``length`` tokens, ``stride`` apart, fit into a stream."""
    return max(0, (num_tokens - length) // stride + 1)


def too_small(shard: Shard, split: str, documents: range, num_tokens: int, length: int) -> DataError:
    """The error of a split that does not hold one sample of ``length`` tokens."""
    return DataError(
        f"{shard.index_path}: the {split} split is {len(documents)} of {shard.num_documents} documents with "
        f"{num_tokens} tokens, one sample takes {length}; give it a larger share in data.split, or more text"
    )
