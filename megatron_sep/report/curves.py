"""Figures of runs as files: those of the page of `watch`, and how far losses are above those of the first run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sep.report.figures import AXES, FIGURES, Figure
from megatron_sep.report.figures import METRICS as FIGURE_METRICS
from megatron_sep.report.follow import Follower
from megatron_sep.report.picture import PictureError, check_format, labelled, pyplot, save
from megatron_sep.report.runs import settings_of
from megatron_sep.train.written import METRICS

Rows = dict[str, list[dict[str, float | None]]]
"""By the name of a run, what it has logged."""
LOSS = "loss (nats per token)"
_DASHES = ("-", "--", ":", "-.")
_FEW = 2
"""Metrics of a figure that dashes tell apart."""
_SETTLED = 0.1
"""Share of the axis after which the vertical axis of a figure that settles is chosen."""


@dataclass(frozen=True)
class Axis:
    """What figures are drawn against, and the lines on either side of one that it is averaged with."""

    name: str = "step"
    reach: int = 0

    def __post_init__(self) -> None:
        if self.name not in AXES:
            raise PictureError(f"--against {self.name}: name one of {', '.join(AXES)}")

    def of(self, rows: Sequence[dict[str, float | None]], metric: str) -> tuple[Any, Any]:
        """Where the metric was logged and what it was, float arrays."""
        found = [(row[self.name], row[metric]) for row in rows if None not in (row[self.name], row[metric])]
        x, y = np.array(found, dtype=float).reshape(-1, 2).T
        return x, y


def plot_losses(run_dirs: Sequence[Path], path: Path, axis: Axis) -> None:
    """Draw train and validation loss of each run; of several, also how far they are above the first.

    Raises PictureError for another suffix than a picture's and for a run that logged neither.
    """
    check_format(path)
    rows = _rows(run_dirs, tuple(FIGURES[0].metrics), axis)
    several = len(run_dirs) > 1
    figure, axes = pyplot().subplots(
        1, 1 + several, figsize=(13 if several else 8, 4.5), layout="constrained", squeeze=False
    )
    _draw(axes[0, 0], FIGURES[0], rows, axis)
    labelled(axes[0, 0], AXES[axis.name], LOSS)
    if several:
        _draw_differences(axes[0, 1], rows, axis)
        labelled(axes[0, 1], AXES[axis.name], f"above {run_dirs[0].name} (nats per token)", "difference of the losses")
    save(figure, path, dpi=150)


def plot_figures(run_dirs: Sequence[Path], folder: Path, axis: Axis) -> Iterator[Path]:
    """Write every figure of `watch` that a run has numbers for, as PNG and SVG, and name each file once it is there.

    Raises PictureError for a run that logged nothing that is drawn.
    """
    rows = _rows(run_dirs, FIGURE_METRICS, axis)
    for figure in FIGURES:
        drawn, axes = pyplot().subplots(figsize=(8, 4.5), layout="constrained")
        if not _draw(axes, figure, rows, axis):
            pyplot().close(drawn)
            continue
        labelled(axes, AXES[axis.name], f"{figure.title} ({figure.unit})" if figure.unit else figure.title)
        paths = [folder / f"{figure.name}.{kind}" for kind in ("png", "svg")]
        save(drawn, *paths, dpi=150)
        yield from paths


def smoothed(values: Any, reach: int) -> Any:
    """The mean of each value and up to ``reach`` on either side of it, as many on both; a float array like it."""
    near = np.minimum(np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]), reach)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    return (sums[places + near + 1] - sums[places - near]) / (2 * near + 1)


def _rows(run_dirs: Sequence[Path], metrics: Sequence[str], axis: Axis) -> Rows:
    """What each run has logged, by its name, or by its path where two have the same. Raises PictureError."""
    found = {}
    unique = len({run_dir.name for run_dir in run_dirs}) == len(run_dirs)
    for run_dir in run_dirs:
        if not (run_dir / METRICS).is_file():
            raise PictureError(f"{run_dir / METRICS}: no such file; name the dir of a run that has begun to train")
        follower = Follower(run_dir)
        follower.look(settings_of(run_dir))
        if all(row[name] is None for row in follower.rows for name in metrics):
            raise PictureError(f"{run_dir / METRICS}: holds no loss; train with metrics.every at most train.steps")
        if all(row[axis.name] is None for row in follower.rows):
            raise PictureError(f"{run_dir / METRICS}: does not tell its {axis.name}; leave --against out")
        found[run_dir.name if unique else str(run_dir)] = follower.rows
    return found


def _draw(axes: Any, figure: Figure, rows: Rows, axis: Axis) -> bool:
    """The curves of a figure, a colour a run and a dash a metric; of many metrics the other way round. Is there any?"""
    many = len(figure.metrics) > _FEW
    drawn = []
    for number, (run, its_rows) in enumerate(rows.items()):
        for kind, (metric, name) in enumerate(figure.metrics.items()):
            x, y = axis.of(its_rows, metric)
            if not len(x):
                continue
            y = y * figure.factor
            colour, dash = (kind, number) if many else (number, kind)
            look = {"color": f"C{colour}", "linestyle": _DASHES[dash % len(_DASHES)]}
            if axis.reach and len(x) > 2:
                axes.plot(x, y, alpha=0.25, linewidth=1, **look)
                y = smoothed(y, axis.reach)
            axes.plot(x, y, label=", ".join(filter(None, (run, name))), marker="o" if len(x) < 40 else "", ms=3, **look)
            drawn.append((x, y))
    if figure.log and drawn:
        axes.set_yscale("log")
    if figure.settles and drawn:
        _settle(axes, drawn, figure.log)
    return bool(drawn)


def _settle(axes: Any, drawn: Sequence[tuple[Any, Any]], log: bool) -> None:
    """Choose the vertical axis by what comes after the steep beginning."""
    last = max(x[-1] for x, _ in drawn)
    values = np.concatenate([y[x >= last * _SETTLED] for x, y in drawn])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    room = (high - low if high - low > 1e-6 * abs(high) else abs(high) or 1) * 0.06
    axes.set_ylim(*((low / 1.1, high * 1.1) if log else (low - room, high + room)))


def _draw_differences(axes: Any, rows: Rows, axis: Axis) -> None:
    """By the validation losses of the first run, or by the training losses where it was not validated."""
    (name, first), *others = rows.items()
    metric = "valid/loss" if len(axis.of(first, "valid/loss")[0]) else "train/loss"
    axes.axhline(0, color="C0", linewidth=1, label=name)
    first_x, first_y = axis.of(first, metric)
    for number, (run, its_rows) in enumerate(others, 1):
        x, y = axis.of(its_rows, metric)
        both = (x >= first_x[0]) & (x <= first_x[-1])
        above = smoothed(y, axis.reach)[both] - np.interp(x[both], first_x, smoothed(first_y, axis.reach))
        axes.plot(x[both], above, color=f"C{number}", marker="o", markersize=3, label=run)
