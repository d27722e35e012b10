"""Speed and sparsity of the steps since the last status line."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.size import ModelSize
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.metrics import peak_flops
from megatron_sep.train.microbatch import Microbatch


@dataclass
class Statistics:
    """Counts what this rank trained on, on its device, and turns it into rates when asked."""

    size: ModelSize
    rules: LayerRules
    steps: int
    topology: Topology
    started: float = field(default_factory=time.perf_counter)
    num_steps: int = 0
    tokens: int = 0
    sequences: int = 0
    counts: Tensor | None = None
    """int64 [2]: visible pairs, separators."""

    def counted(self, batches: Iterable[Microbatch]) -> Iterator[Microbatch]:
        """The same micro-batches, each counted as it is taken."""
        for batch in batches:
            self._count(batch)
            yield batch

    def _count(self, batch: Microbatch) -> None:
        counts = torch.stack([batch.visible_pairs(), self.rules.separators.landmarks(batch.ids_BT).sum()])
        self.counts = counts if self.counts is None else self.counts + counts
        self.tokens += batch.ids_BT.numel()
        self.sequences += batch.ids_BT.shape[0]

    def rates(self, step: int) -> dict[str, float]:
        """Means since the last call, over all ranks; starts counting anew. The device is waited for."""
        assert self.counts is not None
        pairs, separators = self.topology.sum_over_data(self.counts).tolist()
        ranks = self.topology.data.size
        seconds = time.perf_counter() - self.started
        tokens = self.tokens * ranks
        triangle = self.sequences * ranks * self._triangle() * self.size.config.num_layers
        flops = self.size.training_flops(tokens, pairs) / seconds
        peak = peak_flops()
        rates = {
            "speed/tokens_per_second": tokens / seconds,
            "speed/model_flops": flops,
            "speed/seconds_left": seconds / self.num_steps * (self.steps - step),
            "attention/visible": pairs / triangle,
            "attention/separator_density": separators / tokens,
        }
        self.restart()
        return rates | ({"speed/mfu": flops / peak / self.topology.process.size} if peak else {})

    def restart(self) -> None:
        """Forget what was counted and start the clock."""
        self.started, self.num_steps, self.tokens, self.sequences, self.counts = time.perf_counter(), 0, 0, 0, None

    def _triangle(self) -> float:
        length = self.tokens // self.sequences
        return length * (length + 1) / 2
