"""Loss, speed and sparsity of the steps since the last status line."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.size import ModelSize
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.calendar import Calendar
from megatron_sep.train.microbatch import Microbatch
from megatron_sep.train.outcomes import Outcome
from megatron_sep.train.peak import peak_flops

_ASIDES = ("validation", "save", "attention_mass")


@dataclass
class Aside:
    """What is done between steps, and not counted as training."""

    seconds: float = 0.0
    """Since it was logged last."""
    whole: float = 0.0
    """Since the process began."""
    times: int = 0
    """Since the process began."""

    @property
    def mean(self) -> float:
        """Seconds of one time; 0 before the first."""
        return self.whole / self.times if self.times else 0.0


@dataclass
class Statistics:
    """Counts what this rank trained on, on its device, and turns it into rates when asked.

    The clock stands still while something is done ``aside``, which has a time of its own.
    """

    size: ModelSize
    rules: LayerRules
    calendar: Calendar
    topology: Topology
    tokens: int = 0
    sequences: int = 0
    counts: Tensor | None = None
    """int64 [2]: visible pairs, separators."""
    losses: list[float] = field(default_factory=list)
    """Of the steps that were applied."""
    steps: int = 0
    asides: dict[str, Aside] = field(default_factory=lambda: {name: Aside() for name in _ASIDES})
    _whole_saves: float = 0.0
    """Seconds from the beginning of each save to its end, since they were logged last."""
    _started: float = field(default_factory=time.perf_counter)

    def counted(self, batches: Iterable[Microbatch]) -> Iterator[Microbatch]:
        """The same micro-batches, each counted as it is taken."""
        for batch in batches:
            counts = torch.stack([batch.visible_pairs(), self.rules.separators.landmarks(batch.ids_BT).sum()])
            self.counts = counts if self.counts is None else self.counts + counts
            self.tokens += batch.ids_BT.numel()
            self.sequences += batch.ids_BT.shape[0]
            yield batch

    def stepped(self, outcome: Outcome) -> None:
        """A step is over; a loss that was not learnt from is not averaged."""
        self.steps += 1
        if outcome.applied:
            self.losses.append(outcome.loss)

    @contextmanager
    def aside(self, name: str, more: bool = False) -> Iterator[None]:
        """Keep the time of a validation, a save or a look apart from that of the steps. The device is waited for.

        ``more``: of the one that was counted last.
        """
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        yield
        took = time.perf_counter() - begin
        what = self.asides[name]
        what.seconds, what.whole, what.times = what.seconds + took, what.whole + took, what.times + (not more)
        self._started += took

    def saved(self, seconds: float) -> None:
        """A checkpoint is there, so many seconds after it was begun; the steps stood still for a part of them."""
        self._whole_saves += seconds

    def values(self, step: int) -> dict[str, float]:
        """Means since the last call, over all ranks; starts counting anew. The device is waited for."""
        found = self._losses() | self._rates(step) | self.times("save")
        self.forget()
        return found

    def forget(self) -> None:
        """Start counting anew."""
        self.tokens = self.sequences = self.steps = 0
        self.counts, self.losses = None, []
        self._started = time.perf_counter()

    def times(self, name: str) -> dict[str, float]:
        """Seconds of what was done aside since the last call; nothing where it was not done."""
        what = self.asides[name]
        found = {f"time/{name}": what.seconds}
        what.seconds = 0.0
        if name == "save":
            found["time/save_whole"], self._whole_saves = self._whole_saves, 0.0
        return {key: seconds for key, seconds in found.items() if seconds}

    def _losses(self) -> dict[str, float]:
        mean = fmean(self.losses) if self.losses else float("nan")
        return {"train/loss": mean, "train/loss_last": self.losses[-1] if self.losses else float("nan")}

    def _rates(self, step: int) -> dict[str, float]:
        assert self.counts is not None
        pairs, separators = self.topology.sum_over_tokens(self.counts).tolist()
        seconds = time.perf_counter() - self._started
        tokens = self.tokens * self.topology.context.size * self.topology.data.size
        triangle = self.sequences * self.topology.data.size * self._triangle() * self.size.config.num_layers
        flops = self.size.training_flops(tokens, pairs) / seconds
        rates = {
            "speed/tokens_per_second": tokens / seconds,
            "speed/step_seconds": seconds / self.steps,
            "speed/model_flops": flops,
            "speed/seconds_left": self._left(step, seconds / self.steps),
            "attention/visible": pairs / triangle,
            "attention/separator_density": separators / tokens,
        }
        peak = peak_flops()
        mfu = {"speed/mfu": flops / peak / self.topology.process.size} if peak else {}
        return rates | mfu | self._memory()

    def _memory(self) -> dict[str, float]:
        """GiB that the allocator took at most until now, of the process that took most; on a GPU alone."""
        if self.topology.device.type != "cuda":
            return {}
        return {"memory/peak_gib": max(self.topology.of_each(torch.cuda.max_memory_reserved() / 2**30))}

    def _left(self, step: int, step_seconds: float) -> float:
        """Until the run is over: its steps, validations and saves at what each took so far."""
        left = self.calendar.left(step)
        return (
            left.steps * step_seconds
            + left.validations * self.asides["validation"].mean
            + left.saves * self.asides["save"].mean
            + left.looks * self.asides["attention_mass"].mean
        )

    def _triangle(self) -> float:
        length = self.tokens * self.topology.context.size // self.sequences
        return length * (length + 1) / 2
