"""Figures 1 and 5 and Table 2: the loss of runs beside vanilla's, at equal tokens, FLOPs and time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sep.report.curves import LOSS
from megatron_sep.report.picture import labelled, pyplot
from megatron_sep.reproduce.item import Inputs, ReproduceError, Result, Row, Table
from megatron_sep.reproduce.runs import Comparison, Run, comparison, other_seeds
from megatron_sep.reproduce.tasks import PUBLISHED, tables_of

SHARES = {
    "Vanilla": 100.0,
    "StrmLLM n=64": 16.58,
    "SepLLM n=64": 25.83,
    "SepLLM n=128": 35.64,
    "SepLLM n=64, H": 32.01,
    "SepLLM n=64, H/T": 38.18,
}
"""Attention share (%) of Table 2."""
_SHORT = "the paper has a curve and no number"


@dataclass(frozen=True)
class Axis:
    """What two runs are compared at the same amount of."""

    name: str
    label: str
    at: Callable[[Run, Any], Any]
    """How much of it a run has used at these steps."""


def _flops(run: Run, steps: Any) -> Any:
    return steps * run.flops_of_step() / 1e15


def _minutes(run: Run, steps: Any) -> Any:
    return steps * run.step_seconds / 60


TOKENS = Axis("tokens", "training tokens (millions)", lambda run, steps: steps * run.step_tokens / 1e6)
FLOPS = Axis("FLOPs", "training FLOPs (10¹⁵, output layer and visible pairs)", _flops)
MINUTES = Axis("time", "training time (minutes)", _minutes)


def losses(run: Run) -> tuple[Any, Any]:
    """Steps and validation losses, float arrays. Raises ReproduceError where there are fewer than two."""
    steps, values = (np.array(each, dtype=float) for each in run.series("valid/loss"))
    if len(steps) < 2:
        raise ReproduceError(f"{run.dir}: was validated {len(steps)} times, a curve needs two; lower train.eval_every")
    return steps, values


def beside(run: Run, vanilla: Run, axis: Axis) -> tuple[Any, Any, Any]:
    """Where both have a loss: how much of the axis, the run's loss, and vanilla's at the same amount."""
    (steps, loss), (their_steps, their_loss) = losses(run), losses(vanilla)
    x, their_x = axis.at(run, steps), axis.at(vanilla, their_steps)
    both = (x >= their_x[0]) & (x <= their_x[-1])
    return x[both], loss[both], np.interp(x[both], their_x, their_loss)


def final_ratio(run: Run, vanilla: Run, axis: Axis) -> float | None:
    """The last loss of a run over vanilla's at the same amount; None: they have no amount in common."""
    _, loss, theirs = beside(run, vanilla, axis)
    return float(loss[-1] / theirs[-1]) if len(loss) else None


def figure5(inputs: Inputs) -> Result:
    """Losses at equal tokens, and their ratio to vanilla's at equal FLOPs."""
    found = comparison(inputs.folder("figure5"))
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    _draw_losses(left, found, TOKENS)
    _draw_ratios(right, found, FLOPS)
    tables = (*_ratio_tables(found, (TOKENS, FLOPS)), *_seed_tables(found, inputs.folder("figure5")))
    return Result(tables, found.notes, {"figure5": figure})


def figure1(inputs: Inputs) -> Result:
    """Losses and their ratio to vanilla's at equal FLOPs and at equal time."""
    found = comparison(inputs.folder("figure1"))
    figure, axes = pyplot().subplots(2, 2, figsize=(12, 8), layout="constrained")
    for column, axis in enumerate((FLOPS, MINUTES)):
        _draw_losses(axes[0, column], found, axis)
        _draw_ratios(axes[1, column], found, axis)
    note = "Times compare where all runs had the same GPU to themselves; vanilla's attention is a fused kernel."
    return Result(_ratio_tables(found, (FLOPS, MINUTES)), (note, *found.notes), {"figure1": figure})


def table2(inputs: Inputs) -> Result:
    """Perplexity of the validation split beside vanilla's, the attention share, and tasks that were measured."""
    found = comparison(inputs.folder("table2"))
    perplexity = {run.label: math.exp(losses(run)[1][-1]) for run in found.all}
    vanilla = perplexity[found.vanilla.label]
    other = "validation text here, last words of LAMBADA there; fewer tokens"
    ratios, shares = [], []
    for run in found.all:
        paper = PUBLISHED[run.label]["LBD-ppl"] / PUBLISHED["Vanilla"]["LBD-ppl"] if run.label in PUBLISHED else None
        ratios.append(Row(run.label, perplexity[run.label] / vanilla, paper, other))
        seen, share = 100 * run.mean("attention/visible"), SHARES.get(run.label)
        shares.append(Row(run.label, seen, share, "training text here, prompts there"))
    own = tuple(Row(name, value) for name, value in perplexity.items())
    return Result(
        (
            Table("Perplexity of the validation split", own),
            Table("Perplexity over vanilla's", tuple(ratios), 3),
            Table("Visible share of the attention map (%)", tuple(shares)),
            *tables_of(found.all, other_seeds(found, inputs.folder("table2"))),
        ),
        found.notes,
    )


def _ratio_tables(found: Comparison, axes: tuple[Axis, ...]) -> tuple[Table, ...]:
    last = tuple(Row(run.label, float(losses(run)[1][-1]), None, _SHORT) for run in found.all)
    return (
        Table("Last validation loss (nats per token)", last, 4),
        *(
            Table(
                f"Last loss over vanilla's at the same {axis.name}",
                tuple(Row(run.label, final_ratio(run, found.vanilla, axis), None, _SHORT) for run in found.others),
                4,
            )
            for axis in axes
        ),
    )


def _seed_tables(found: Comparison, folder: Path) -> tuple[Table, ...]:
    """How far the last losses of other seeds are from those of the first; no table without other seeds."""
    first = {run.label: float(losses(run)[1][-1]) for run in found.all}
    rows = tuple(
        Row(run.seed_label, float(losses(run)[1][-1]) - first[run.label], None, _SHORT)
        for run in other_seeds(found, folder)
    )
    return (
        (Table("Last validation loss of another seed over that of the first (nats per token)", rows, 4),)
        if rows
        else ()
    )


def _draw_losses(axes: Any, found: Comparison, axis: Axis) -> None:
    """Without the first third of the steps, so that the end can be told apart."""
    tops, lows, begins = [], [], []
    for number, run in enumerate(found.all):
        steps, loss = losses(run)
        x, third = axis.at(run, steps), len(loss) // 3
        axes.plot(x, loss, **style(number), label=run.label)
        tops.append(float(loss[third]))
        lows.append(float(loss.min()))
        begins.append(float(x[third]))
    axes.set_ylim(min(lows) - 0.05 * (max(tops) - min(lows)), max(tops))
    axes.set_xlim(left=min(begins))
    labelled(axes, axis.label, LOSS, "validation, its last two thirds")


def _draw_ratios(axes: Any, found: Comparison, axis: Axis) -> None:
    """Of the same steps, in the colours of the losses beside or above: the first ones would flatten all that follow."""
    axes.axhline(1, color="black", linewidth=1)
    for number, run in enumerate(found.others, 1):
        x, loss, theirs = beside(run, found.vanilla, axis)
        late = x >= axis.at(run, losses(run)[0])[len(losses(run)[0]) // 3]
        axes.plot(x[late], loss[late] / theirs[late], **style(number))
    labelled(axes, axis.label, "loss over vanilla's", f"at the same {axis.name}; below 1 is better than vanilla")


def style(number: int) -> dict[str, Any]:
    """Of the curve of a run: vanilla, the first one, is black."""
    return {"color": "black" if number == 0 else f"C{number - 1}", "marker": "o", "markersize": 2.5, "linewidth": 1.3}
