"""Figures 4 and 7, equations 3 and 4: the four blocks of the bounded cache, token after token."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.layout import Layout
from megatron_sep.generate.slots import Slots
from megatron_sep.report.picture import labelled, pyplot
from megatron_sep.reproduce.cache_sizes import sep, stream
from megatron_sep.reproduce.item import Inputs, Result, Row, Table

BLOCKS = {
    "initial": ("sinks",),
    "separator": ("separators",),
    "past window": ("separators of the past window", "past window"),
    "local window": ("window",),
}
"""The paper's four, of those that the cache tells apart."""
_COLOURS = ("#54a24b", "#f58518", "#9ecae9", "#4c78a8")
USUAL = sep(4, 64, 256, 800)


@dataclass(frozen=True)
class Evolution:
    """Tokens in each block after each token of a stream."""

    policy: StreamingPattern
    blocks: dict[str, Tensor]
    """int64 [T] by the paper's name."""

    @property
    def size_T(self) -> Tensor:
        """Size_run: tokens in the cache."""
        return torch.stack([*self.blocks.values()]).sum(0)

    @property
    def neighbours_T(self) -> Tensor:
        """n: tokens of the past and the local window."""
        return self.blocks["past window"] + self.blocks["local window"]

    @property
    def period(self) -> int:
        """Tokens from one eviction to the next once the separator block is full."""
        return (self.policy.capacity or 0) - self.policy.sinks - (self.policy.separators or 0) - self.policy.window

    @property
    def settled(self) -> int:
        """m0: tokens after which the separator block is full and stays so."""
        return int((self.blocks["separator"] >= (self.policy.separators or 0)).int().argmax())

    def whole_periods(self, values_T: Tensor) -> Tensor:
        """The values of as many whole periods as there are after m0."""
        periods = (len(values_T) - self.settled) // self.period
        return values_T[self.settled : self.settled + periods * self.period]


@lru_cache(maxsize=4)
def evolve(policy: StreamingPattern, tokens: int) -> Evolution:
    """Feed a stream of the Pile's density to the cache, a token at a time."""
    ids = stream(tokens)
    slots = Slots([policy], 1, 1, ids.device)
    counts = []
    for t in range(tokens):
        slots.begin(ids[:, t : t + 1], Layout())
        slots.end()
        counts.append(torch.stack([*slots.blocks().values()])[:, 0])
    by_name = dict(zip(slots.blocks(), torch.stack(counts, 1), strict=True))
    return Evolution(policy, {name: sum(by_name[part] for part in parts) for name, parts in BLOCKS.items()})


def figure4(inputs: Inputs) -> Result:
    """The automaton at a size that can be read: each bar is the cache after a token."""
    del inputs
    found = evolve(sep(1, 3, 4, 12), 48)
    figure, axes = pyplot().subplots(figsize=(9, 3.6), layout="constrained")
    _stack(axes, found, found.policy.capacity or 0, step=None)
    axes.set_xlabel("tokens of the text")
    axes.set_title("a=1 s=3 w=4 c=12: an eviction leaves a + s + w tokens", loc="left", fontsize=10)
    return Result(notes=(_EVICTION,), figures={"figure4": figure})


_EVICTION = (
    "When the cache holds c tokens, separators of the past window join the separator block, of which the newest s "
    "stay; the rest of the past window leaves."
)


def figure7(inputs: Inputs) -> Result:
    """n and Size_run of a long stream, against equations 3 and 4."""
    del inputs
    found = evolve(USUAL, 3000)
    figure, (top, below) = pyplot().subplots(2, 1, figsize=(9, 6), layout="constrained", sharex=True)
    _stack(top, found, found.policy.capacity or 0, step="post")
    top.set_title("a=4 s=64 w=256 c=800: blocks of the cache", loc="left", fontsize=10)
    rows = (
        Row("equation 3: mean n", _mean(found, found.neighbours_T), _equation_3(found.policy), _HALF),
        Row("equation 4: mean Size_run", _mean(found, found.size_T), found.policy.mean_size, _HALF),
    )
    for values_T, colour, label, row in zip(
        (found.size_T, found.neighbours_T), ("#4c78a8", "#e45756"), ("Size_run", "n"), rows[::-1], strict=True
    ):
        below.plot(values_T, color=colour, label=f"{label}, mean {row.ours:.1f} after m0 (limit {row.paper:.0f})")
        below.axhline(row.paper, color=colour, linestyle="--", linewidth=1)
    below.axvline(found.settled, color="black", linewidth=1, linestyle=":", label=f"m0 = {found.settled:,} tokens")
    below.set_ylim(0, (found.policy.capacity or 0) * 1.05)
    labelled(below, "tokens of the text", "tokens in the cache")
    return Result((Table("Tokens, mean over whole periods after m0", rows, 1),), (_EVICTION,), {"figure7": figure})


_HALF = "half a token: an eviction comes when the cache holds c tokens, so no query finds c"


def _equation_3(policy: StreamingPattern) -> float:
    return policy.mean_size - policy.sinks - (policy.separators or 0)


def _mean(found: Evolution, values_T: Tensor) -> float:
    return float(found.whole_periods(values_T).double().mean())


def _stack(axes: Any, found: Evolution, capacity: int, step: str | None) -> None:
    places = torch.arange(1, len(found.size_T) + 1).tolist()
    below = torch.zeros_like(found.size_T)
    for (name, count_T), colour in zip(found.blocks.items(), _COLOURS, strict=True):
        if step is None:
            axes.bar(places, count_T.tolist(), bottom=below.tolist(), color=colour, width=0.85, label=name)
        else:
            top = (below + count_T).tolist()
            axes.fill_between(
                places, below.tolist(), top, color=colour, step=step, linewidth=0, label=name, rasterized=True
            )
        below = below + count_T
    axes.axhline(capacity, color="black", linewidth=1, linestyle="--", label=f"c = {capacity}")
    axes.set_ylabel("tokens in the cache")
    axes.set_ylim(0, capacity * 1.05)
    axes.margins(x=0.01)
    axes.legend(frameon=False, ncols=5, loc="upper left", bbox_to_anchor=(0, -0.12), fontsize=9)
