"""`plot` draws the losses of runs, of several how far they are above the first, and every figure of `watch`."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.left_runs import left_run

from megatron_sep.report import curves
from megatron_sep.report.picture import PictureError, pyplot


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that would have been written."""
    figures: list[Any] = []
    monkeypatch.setattr(curves, "save", lambda figure, *_, **__: figures.append(figure))
    return figures


def test_differences_to_the_first_run(tmp_path: Path, drawn: list[Any]) -> None:
    """The second panel has the gap of each other run at every validation."""
    dirs = [
        left_run(tmp_path / name, {"window": None}, gap=gap) for name, gap in (("a", 0.0), ("b", 0.25), ("c", -0.5))
    ]
    curves.plot_losses(dirs, tmp_path / "x.png", curves.Axis())
    zero, *others = drawn[0].axes[1].get_lines()
    assert set(zero.get_ydata()) == {0}
    assert [line.get_label() for line in others] == ["b", "c"]
    for line, gap in zip(others, (0.25, -0.5), strict=True):
        assert line.get_ydata() == pytest.approx([gap] * len(line.get_ydata()))
        assert len(line.get_ydata()) == 20


def test_a_single_run_has_one_panel(tmp_path: Path, drawn: list[Any]) -> None:
    """Training and validation loss, with the unit on the axis."""
    curves.plot_losses([left_run(tmp_path / "a", {"window": None})], tmp_path / "x.png", curves.Axis())
    (axes,) = drawn[0].axes
    assert len(axes.get_lines()) == 2
    assert axes.get_ylabel() == "loss (nats per token)"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    with pytest.raises(PictureError, match="holds no loss"):
        curves.plot_losses([tmp_path / "b"], tmp_path / "x.png", curves.Axis())
    pyplot().close("all")


def test_every_figure_of_watch_as_files(tmp_path: Path) -> None:
    """PNG and SVG of those that a run has numbers for, named as in the table; an axis that no line has is refused."""
    run = left_run(tmp_path / "a", {"window": 64})
    look = {f"attention/mass/sep/{kind}": 0.25 for kind in ("first", "separators", "window", "rest")}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 400, **look}) + "\n")
    made = list(curves.plot_figures([run], tmp_path / "figures", curves.Axis()))
    assert [path.name for path in made[::2]] == ["loss.png", "visible.png", "separators.png", "mass_sep.png"]
    assert sorted(made) == sorted((tmp_path / "figures").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made[::2])
    assert all(b"<svg" in path.read_bytes() for path in made[1::2])
    again = list(curves.plot_figures([run], tmp_path / "again", curves.Axis()))
    assert all(old.read_bytes() == new.read_bytes() for old, new in zip(made, again, strict=True))
    with pytest.raises(PictureError, match="does not tell its tokens"):
        list(curves.plot_figures([run], tmp_path / "more", curves.Axis("tokens")))
    with pytest.raises(PictureError, match="--against time: name one of step, tokens"):
        curves.Axis("time")
    assert not (tmp_path / "more").exists()


def test_smoothing_and_the_axis(tmp_path: Path, drawn: list[Any]) -> None:
    """A mean of as many values on both sides; the vertical axis is that of what comes after the steep beginning."""
    values = np.array([float(i * i % 17) for i in range(30)])
    means = [values[i - near : i + near + 1].mean() for i in range(30) for near in [min(4, i, 29 - i)]]
    assert curves.smoothed(values, 4) == pytest.approx(means)
    assert curves.smoothed(values, 0) == pytest.approx(values)
    curves.plot_losses([left_run(tmp_path / "a", {"window": None})], tmp_path / "x.png", curves.Axis("seconds", 2))
    (axes,) = drawn[0].axes
    assert len(axes.get_lines()) == 4
    assert len(axes.get_legend_handles_labels()[1]) == 2
    assert axes.get_lines()[0].get_xdata()[-1] == 400 * 2.0
    assert axes.get_ylim()[1] < 3 + 4 * math.exp(-0.4) + 0.3 < axes.get_lines()[0].get_ydata()[0]
