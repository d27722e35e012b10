"""Figure 6: a vanilla checkpoint goes on as SepLLM, on the cosine it was on or on a whole new one."""

from typing import Any

import numpy as np

from megatron_sep.report.curves import LOSS
from megatron_sep.report.picture import labelled, pyplot
from megatron_sep.reproduce.item import TRAIN, Inputs, ReproduceError, Result, Row, Table
from megatron_sep.reproduce.losses import losses, style
from megatron_sep.reproduce.runs import VANILLA, Run, find_runs


def figure6(inputs: Inputs) -> Result:
    """Losses since the switch, and how far they are above vanilla, which went on as it was."""
    folder = inputs.folder("figure6")
    runs = find_runs(folder)
    switched = [run for run in runs if run.post_trained]
    vanilla = next((run for run in runs if run.label == VANILLA and not run.post_trained), None)
    if vanilla is None or not switched:
        raise ReproduceError(
            f"--runs {folder}: needs a run from scratch with full attention and runs with checkpoint.init_from; "
            f"{TRAIN} makes both"
        )
    at = max(run.config.checkpoint.init_step for run in switched)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    before = float(np.interp(at, *losses(vanilla)))
    left.axhline(before, color="grey", linestyle="--", linewidth=1, label="vanilla at the switch")
    their_x, their_loss = since(vanilla, at)
    left.plot(their_x, their_loss, **style(0), label="Vanilla goes on")
    rows, back = [], []
    for number, run in enumerate(switched, 1):
        x, loss = since(run, run.config.checkpoint.init_step)
        x, loss = x[x <= their_x[-1]], loss[x <= their_x[-1]]
        name = run.label + (", larger lr" if run.config.checkpoint.init_step < at else "")
        theirs = np.interp(x, their_x, their_loss)
        left.plot(x, loss, **style(number), label=name)
        right.plot(x, loss - theirs, **style(number), label=name)
        rows.append(Row(name, float(loss[-1] - theirs[-1]), None, "the paper has curves and no numbers"))
        back.append(Row(name, _first_below(x, loss, before), None, "empty: not within the run"))
    right.axhline(0, color="black", linewidth=1)
    labelled(left, "tokens since the switch (millions)", LOSS, "validation")
    labelled(right, "tokens since the switch (millions)", "loss above vanilla's (nats per token)", "difference")
    return Result(
        (
            Table("Loss above vanilla's at the end (nats per token)", tuple(rows), 4),
            Table("Tokens until the loss is below vanilla's at the switch (millions)", tuple(back), 1),
        ),
        (f"The switch is at step {at:,} of {vanilla.config.train.steps:,}; the paper's at 93,000 of 143,000.",),
        {"figure6": figure},
    )


def since(run: Run, step: int) -> tuple[Any, Any]:
    """Millions of tokens after a step, and the validation losses there."""
    steps, loss = losses(run)
    later = steps >= step
    return (steps[later] - step) * run.step_tokens / 1e6, loss[later]


def _first_below(x: Any, loss: Any, limit: float) -> float | None:
    below = np.flatnonzero(loss < limit)
    return float(x[below[0]]) if len(below) else None
