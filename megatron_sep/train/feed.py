"""This rank's micro-batches of each global batch, read ahead of the step that needs them."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import TrainConfig
from megatron_sep.data.samples import Samples
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.microbatch import Microbatch

Rows = tuple[Tensor, Tensor | None]
"""Ids int64 and weights fp32 of a micro-batch, [B, T + 1] each."""


class Feed:
    """The rows that follow a number of consumed sequences, whatever the number of ranks.

    While a step runs, a thread reads the rows of the next one, into pinned memory where a GPU waits for them.
    """

    def __init__(
        self, samples: Samples, rules: Callable[[int], LayerRules], train: TrainConfig, topology: Topology
    ) -> None:
        """``rules`` of a step: the window may shrink from one to the next."""
        self.samples, self.rules, self.size = samples, rules, train.micro_batch_size
        self.global_batch_size = train.global_batch_size
        self._topology = topology
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[list[Rows]]] | None = None
        self._first: list[Rows] = []

    @property
    def num_microbatches(self) -> int:
        """Of one rank in one step."""
        return self.global_batch_size // (self.size * self._topology.data.size)

    def shares(self, consumed: int) -> dict[str, float]:
        """Share and epochs of each source so far, beside the share that was asked for."""
        shares = self.samples.shares(consumed)
        values = {f"data/{s.name}/epochs": s.epochs for s in shares}
        if len(shares) > 1:
            values |= {f"data/{s.name}/share": s.given for s in shares}
            values |= {f"data/{s.name}/share_asked": s.asked for s in shares}
        return values

    def take(self, step: int, consumed: int) -> Iterator[Microbatch]:
        """The global batch of a step, which follows ``consumed`` sequences. Raises DataError where it is due."""
        yield from self._microbatches(step, self._rows(consumed))

    def first(self, step: int, count: int) -> Iterator[Microbatch]:
        """``count`` of this rank's micro-batches of the very first global batch, under the rules of a step."""
        if len(self._first) != count:
            self._first = self._read(0, count)
        return self._microbatches(step, self._first)

    def _microbatches(self, step: int, rows: Iterable[Rows]) -> Iterator[Microbatch]:
        rules = self.rules(step)
        for ids_BT1, weight_BT1 in rows:
            share = self._topology.share(ids_BT1.shape[1] - 1)
            yield Microbatch.of(ids_BT1, rules, self._topology.device, weight_BT1, share)

    def _rows(self, consumed: int) -> list[Rows]:
        ahead = self._ahead
        found = ahead[1].result() if ahead is not None and ahead[0] == consumed else self._read(consumed)
        following = consumed + self.global_batch_size
        self._ahead = (following, self._reader.submit(self._read, following))
        return found

    def _read(self, consumed: int, count: int | None = None) -> list[Rows]:
        """All of this rank's micro-batches of a global batch, or ``count`` of them."""
        batch = range(consumed, consumed + self.global_batch_size)
        ranks = self._topology.data
        firsts = [consumed + (i * ranks.size + ranks.rank) * self.size for i in range(self.num_microbatches)[:count]]
        found = [self.samples.take(first, self.size, batch) for first in firsts]
        return [(self._tensor(ids), None if weights is None else self._tensor(weights)) for ids, weights in found]

    def _tensor(self, values: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self._topology.device.type == "cuda" else tensor
