"""Passes over micro-batches as CUDA graphs: recorded once for each kind of them, then replayed without Python."""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_sep.parallel.groups import before_groups_go
from megatron_sep.parallel.seeds import nothing_drawn
from megatron_sep.train.microbatch import Microbatch

_EAGER = 2
"""Passes before a recording: compilation, tuning of kernels and first allocations cannot be recorded."""
_KEPT = 8
"""Recordings: of training, its first micro-batch, its last and the others, and of validation; and before a window
shrank."""

Pass = Callable[[Microbatch], Tensor]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    batch: Microbatch
    """Its tensors are what the graph reads."""
    out: Tensor

    def replay(self, batch: Microbatch) -> Tensor:
        self.batch.rows_BT1.copy_(batch.rows_BT1)
        if self.batch.weights_BT1 is not None and batch.weights_BT1 is not None:
            self.batch.weights_BT1.copy_(batch.weights_BT1)
        self.graph.replay()
        return self.out.clone()


class Recorder:
    """Replays passes; all recordings share one pool of memory, so that only the largest counts.

    A pass is a function of its micro-batch and of tensors that stay where they are: weights and gradient buffers. The
    values that Python works with, a window or a number of micro-batches, belong to the kind.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._pool = torch.cuda.graph_pool_handle()
        self._passes: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}
        self._said: set[str] = set()
        before_groups_go(self.forget)

    def run(self, name: str, compute: Pass, batch: Microbatch, *values: Hashable) -> Tensor:
        """``compute(batch)``, a scalar; ``name`` and ``values`` tell apart what differs beside the micro-batch."""
        kind = (name, batch.kind, *values)
        if kind not in self._recordings:
            self._passes[kind] += 1
            if self._passes[kind] <= _EAGER:
                return compute(batch)
            self._record(name, kind, compute, batch)
        return self._recordings[kind].replay(batch)

    def forget(self) -> None:
        """Drop all recordings."""
        self._recordings.clear()

    def _record(self, name: str, kind: Hashable, compute: Pass, batch: Microbatch) -> None:
        while len(self._recordings) >= _KEPT:
            self._recordings.pop(next(iter(self._recordings)))
        weights = None if batch.weights_BT1 is None else batch.weights_BT1.clone()
        static = replace(batch, rows_BT1=batch.rows_BT1.clone(), weights_BT1=weights)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        others_go_on = "thread_local"  # one reads ahead
        try:
            with nothing_drawn(), torch.cuda.graph(graph, self._pool, stream, capture_error_mode=others_go_on):
                out = compute(static)
        except BaseException:
            graph.reset()  # or the process groups would wait for it
            raise
        self._recordings[kind] = _Recording(graph, static, out)
        if name not in self._said:
            self._said.add(name)
            self._say(f"{name}: recorded as a CUDA graph, from here on replayed")
