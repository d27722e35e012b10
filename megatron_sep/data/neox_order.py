"""GPT-NeoX's order of samples, which Pythia was trained in, computed from its documented construction.

All epochs that the run needs form one list of documents, which ``numpy.random.RandomState(seed)`` shuffles; sample k is
``T + 1`` tokens from token ``k T`` of the documents in that order; then the same generator shuffles the samples of all
epochs together. Unlike the orders of ``samples.py`` it depends on the number of samples of the run, through the epochs.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sep.data.samples import Ids, Span, spans_in
from megatron_sep.data.shards import Shard
from megatron_sep.files import written_aside


def num_epochs(tokens_per_epoch: int, sequence_length: int, num_samples: int) -> int:
    """The fewest epochs that hold ``num_samples``; the last token of a sample is the first of the next."""
    return max(1, -(-(num_samples * sequence_length + 1) // tokens_per_epoch))


class ShuffledDocuments:
    """Sequences of a shard, every epoch of them, in a shuffled order, as one stream of tokens.

    ``order``: the sequence at each place; ``ends``: tokens of the stream up to the end of each place.
    """

    def __init__(self, shard: Shard, order: npt.NDArray[np.int32], ends: npt.NDArray[np.int64], epochs: int) -> None:
        self.shard, self._order, self._ends, self.epochs = shard, order, ends, epochs
        self._itemsize = np.dtype(shard.dtype).itemsize
        self.num_tokens = int(ends[-1])

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        parts = [self.shard.tokens(a, b) for a, b in self.pieces(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def spans(self, start: int, stop: int) -> list[Span]:
        return [span for a, b in self.pieces(start, stop) for span in spans_in(self.shard, a, b)]

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where tokens [start, stop) lie in the shard."""
        found = []
        entry = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            document, end = int(self._order[entry]), int(self._ends[entry])
            last = min(stop, end)
            base = int(self.shard.pointers[document]) // self._itemsize + int(self.shard.lengths[document])
            if start < last:
                found.append((base - (end - start), base - (end - last)))
            start, entry = max(start, last), entry + 1
        return found


class ShuffledSamples:
    """Sample i of the run, from the table of GPT-NeoX; past its end it begins again."""

    def __init__(self, table: npt.NDArray[Any]) -> None:
        self._table = table

    def __call__(self, index: Ids) -> Ids:
        return np.asarray(self._table[index % len(self._table)], np.int64)


def neox_order(
    shard: Shard, sequences: range, sequence_length: int, num_samples: int, seed: int, cache: Path | None
) -> tuple[ShuffledDocuments, ShuffledSamples]:
    """Stream and order of a run of ``num_samples`` over ``sequences``, from ``cache`` where they lie there already."""
    lengths = shard.lengths[sequences.start : sequences.stop]
    tokens = int(lengths.sum(dtype=np.int64))
    epochs = num_epochs(tokens, sequence_length, num_samples)
    names = ("documents", "ends", "samples")
    key = f"{shard.index_path.resolve()}:{shard.num_tokens}:{sequences}:{sequence_length}:{epochs}:{seed}"
    paths = [Path(cache or "") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-{name}.npy" for name in names]
    if cache is not None and all(path.exists() for path in paths):
        documents, ends, samples = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    else:
        documents, ends, samples = _build(lengths, sequences.start, sequence_length, epochs, seed)
        if cache is not None:
            _save(paths, (documents, ends, samples))
    return ShuffledDocuments(shard, documents, ends, epochs), ShuffledSamples(samples)


def _build(
    lengths: npt.NDArray[np.int32], first: int, sequence_length: int, epochs: int, seed: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[Any]]:
    """The documents of all epochs shuffled, where each ends in tokens, and the samples shuffled."""
    generator = np.random.RandomState(seed)
    documents = np.tile(np.arange(first, first + len(lengths), dtype=np.int32), epochs)
    generator.shuffle(documents)
    ends = lengths[documents - first].cumsum(dtype=np.int64)
    count = (int(ends[-1]) - 1) // sequence_length
    samples = np.arange(count, dtype=np.uint32 if count < 2**32 - 2 else np.int64)
    generator.shuffle(samples)
    return documents, ends, samples


def _save(paths: list[Path], arrays: tuple[npt.NDArray[Any], ...]) -> None:
    """Several ranks may write the same files at once."""
    for path, array in zip(paths, arrays, strict=True):
        with written_aside(path) as aside, aside.open("wb") as file:
            np.save(file, array, allow_pickle=False)
