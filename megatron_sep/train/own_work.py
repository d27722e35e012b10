"""How long each rank works in a step before it waits for the others, so that a slow one can be named."""

import math
import statistics
import time
from dataclasses import dataclass, field

import torch

from megatron_sep.parallel.topology import Topology
from megatron_sep.train.history import History

_SLOW = 1.5
"""Times as long as the others', from which on a rank is named."""
_LEAST_SECONDS = 0.01


@dataclass
class OwnWork:
    """Measures this rank's forward and backward passes, up to where the gradients of all are reduced."""

    device: torch.device
    _spans: list[tuple[object, object]] = field(default_factory=list)
    _begun: object = None

    def begin(self) -> None:
        """A step begins."""
        self._begun = self._now()

    def end(self) -> None:
        """From here on this rank waits for the others."""
        if self._begun is not None:
            self._spans.append((self._begun, self._now()))
            self._begun = None

    def seconds(self) -> float:
        """The mean of the steps since the last call; NaN where none was measured. The device is waited for."""
        spans, self._spans = self._spans, []
        found = [self._between(*span) for span in spans]
        return sum(found) / len(found) if found else math.nan

    def _now(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, begin: object, end: object) -> float:
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin


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
