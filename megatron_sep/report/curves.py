"""Loss curves of runs, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sep.report.picture import PictureError, check_format, labelled, pyplot, save
from megatron_sep.train.written import read_jsonl

Curve = tuple[list[float], list[float]]
LOSS = "loss (nats per token)"


def curve(run_dir: Path, name: str) -> Curve:
    """Steps and values of one metric of a run. Raises PictureError where the run has logged nothing yet."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise PictureError(f"{path}: no such file; name the dir of a run that has begun to train")
    lines = [line for line in read_jsonl(path) if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def plot_losses(run_dirs: Sequence[Path], path: Path) -> None:
    """Draw train and validation loss of each run against its step; of several, also how far they are above the first.

    Raises PictureError for another suffix than a picture's and for a run that logged neither.
    """
    check_format(path)
    several = len(run_dirs) > 1
    figure, axes = pyplot().subplots(
        1, 1 + several, figsize=(13 if several else 8, 4.5), layout="constrained", squeeze=False
    )
    for number, run_dir in enumerate(run_dirs):
        _draw(axes[0, 0], run_dir, f"C{number}")
    labelled(axes[0, 0], "step", LOSS)
    if several:
        _draw_differences(axes[0, 1], run_dirs)
        labelled(axes[0, 1], "step", f"above {run_dirs[0].name} (nats per token)", "difference of the losses")
    save(figure, path, dpi=150)


def _draw(axes: Any, run_dir: Path, colour: str) -> None:
    train, valid = curve(run_dir, "train/loss"), curve(run_dir, "valid/loss")
    if not train[0] and not valid[0]:
        raise PictureError(f"{run_dir / 'metrics.jsonl'}: holds no loss; train with metrics.every at most train.steps")
    axes.plot(*train, color=colour, alpha=0.4, linewidth=1, label=f"{run_dir.name}, training")
    axes.plot(*valid, color=colour, marker="o", markersize=4, label=f"{run_dir.name}, validation")


def _draw_differences(axes: Any, run_dirs: Sequence[Path]) -> None:
    """By the validation losses of the first run, or by the training losses where it was not validated."""
    name = "valid/loss" if curve(run_dirs[0], "valid/loss")[0] else "train/loss"
    axes.axhline(0, color="C0", linewidth=1, label=run_dirs[0].name)
    first_steps, first = curve(run_dirs[0], name)
    for number, run_dir in enumerate(run_dirs[1:], 1):
        steps, values = (np.array(each) for each in curve(run_dir, name))
        both = (steps >= first_steps[0]) & (steps <= first_steps[-1])
        above = values[both] - np.interp(steps[both], first_steps, first)
        axes.plot(steps[both], above, color=f"C{number}", marker="o", markersize=3, label=run_dir.name)
