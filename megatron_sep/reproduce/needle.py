"""Figures 8 to 11: needles in a haystack, of what `megatron_sep eval --needle` left in the dirs of runs."""

from collections.abc import Sequence
from typing import Any

from megatron_sep.files import parse_json
from megatron_sep.report.picture import pyplot
from megatron_sep.reproduce.item import Inputs, Make, ReproduceError, Result, Row, Table
from megatron_sep.reproduce.runs import Run, check_weights, find_runs
from megatron_sep.weights.identity import WEIGHTS

FILE = "needle.json"
MEASURE = f"megatron_sep eval RUN --needle TEXT --needle-keys 4 --out RUN/{FILE}"
"""What makes the file of a run."""
_CHANCE = "chance is 10 %; the paper has a picture and no number"
Cells = Sequence[dict[str, float]]
"""Shares of right answers, a length and a depth each."""


def cells_of(run: Run) -> Cells | None:
    """What was measured of a run; None: nothing. Raises ReproduceError for a file of something else, or of others of
    its weights than the newest."""
    path = run.dir / FILE
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        cells: Cells = found["needle"]
        weights = found.get("question", {}).get(WEIGHTS)
        for cell in cells:
            float(cell["length"]), float(cell["depth"]), float(cell["choice"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReproduceError(f"{path}: is no file of `{MEASURE}`: {error!r}") from error
    check_weights(path, weights, MEASURE)
    return cells


def heat_maps(name: str, *labels: str) -> Make:
    """Makes the maps of the runs that the paper calls so, one panel each."""

    def make(inputs: Inputs) -> Result:
        folder = inputs.folder(name)
        runs = {run.label: cells for run in find_runs(folder) if (cells := cells_of(run)) and not run.post_trained}
        found = {label: runs[label] for label in labels if label in runs}
        if not found:
            wanted = " or ".join(labels)
            raise ReproduceError(f"{name}: no {FILE} of {wanted} below --runs {folder}; `{MEASURE}` makes one")
        figure, axes = pyplot().subplots(
            1, len(found), figsize=(1 + 4.6 * len(found), 4), layout="constrained", squeeze=False
        )
        for axis, (label, cells) in zip(axes[0], found.items(), strict=True):
            image = _draw(axis, label, cells)
        figure.colorbar(image, ax=axes, label="right among ten numbers (share of the texts)")
        rows = tuple(
            Row(label, 100 * sum(cell["choice"] for cell in cells) / len(cells), None, _CHANCE)
            for label, cells in found.items()
        )
        return Result((Table("Right among ten numbers (%), mean of all cells", rows, 1),), figures={name: figure})

    return make


def _draw(axis: Any, label: str, cells: Cells) -> Any:
    lengths, depths = (sorted({cell[key] for cell in cells}) for key in ("length", "depth"))
    choice = {(cell["depth"], cell["length"]): cell["choice"] for cell in cells}
    share = [[choice.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    image = axis.imshow(share, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(share):
        for column, value in enumerate(line):
            colour = "white" if abs(value - 0.5) > 0.4 else "black"
            axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=9, color=colour)
    axis.set_xticks(range(len(lengths)), [f"{length:,.0f}" for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set_xlabel("length of the text (tokens)")
    axis.set_ylabel("depth of the needle")
    axis.set_title(label, loc="left", fontsize=10)
    return image
