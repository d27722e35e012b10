"""How long each rank works in a step before it waits for the others, so that a slow one can be named."""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sep.parallel.topology import Topology
from megatron_sep.train.history import History

_SLOW = 1.5
"""Times as long as the others', from which on a rank is named."""
_LEAST_SECONDS = 0.01


class OwnWork:
    """Measures this rank's forward and backward passes of a step, up to where it waits for the others' gradients."""

    def __init__(self, device: torch.device) -> None:
        self._clock = _DeviceClock() if device.type == "cuda" else _HostClock()

    def begin(self) -> None:
        """A step begins."""
        self._clock.begin()

    def end(self) -> None:
        """From here on this rank waits for the others. A CUDA graph may record it."""
        self._clock.end()

    def seconds(self) -> float:
        """On a CPU the mean of the steps since the last call, on a GPU the last step, for which it waits; or NaN."""
        return self._clock.seconds()


class _HostClock:
    def __init__(self) -> None:
        self._spans: list[float] = []
        self._begun = 0.0

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def end(self) -> None:
        self._spans.append(time.perf_counter() - self._begun)

    def seconds(self) -> float:
        spans, self._spans = self._spans, []
        return statistics.fmean(spans) if spans else math.nan


class _DeviceClock:
    """Two events that every step records anew, in a replayed graph too."""

    def __init__(self) -> None:
        made: list[Any] = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._begin, self._end = made
        self._ended = False

    def begin(self) -> None:
        self._begin.record()

    def end(self) -> None:
        self._end.record()
        self._ended = True

    def seconds(self) -> float:
        if not self._ended:
            return math.nan
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1000


@dataclass
class SlowRanks:
    """Compares the ranks and names the slowest where it is much slower than the others; once, until another one is."""

    topology: Topology
    history: History
    _named: int | None = None

    def compared(self, step: int, own_seconds: float) -> dict[str, float]:
        """Of a status line: the slowest rank's seconds and the others' median. Every rank calls it together."""
        if self.topology.process.size == 1:
            return {}
        found = self.topology.of_each(own_seconds)
        slowest = max(range(len(found)), key=found.__getitem__)
        others = statistics.median(found[:slowest] + found[slowest + 1 :])
        if not math.isfinite(sum(found)):
            return {}
        if found[slowest] > max(_SLOW * others, others + _LEAST_SECONDS) and slowest != self._named:
            self._name(step, slowest, found[slowest], others)
        return {"speed/slowest_rank": slowest, "speed/slowest_seconds": found[slowest], "speed/others_seconds": others}

    def _name(self, step: int, rank: int, seconds: float, others: float) -> None:
        self._named = rank
        who = self.topology.watch.who(rank)
        self.topology.say(
            f"step {step}: {who} is slow: {seconds:.3f} s of its own work a step, the others {others:.3f} s"
        )
        self.history.add("slow rank", step=step, rank=rank, process=who, seconds=seconds, others=others)
