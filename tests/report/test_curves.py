"""`plot` draws the losses of runs, and of several how far they are above the first."""

from pathlib import Path
from typing import Any

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
    curves.plot_losses(dirs, tmp_path / "x.png")
    zero, *others = drawn[0].axes[1].get_lines()
    assert set(zero.get_ydata()) == {0}
    assert [line.get_label() for line in others] == ["b", "c"]
    for line, gap in zip(others, (0.25, -0.5), strict=True):
        assert line.get_ydata() == pytest.approx([gap] * len(line.get_ydata()))
        assert len(line.get_ydata()) == 20


def test_a_single_run_has_one_panel(tmp_path: Path, drawn: list[Any]) -> None:
    """Training and validation loss, with the unit on the axis."""
    curves.plot_losses([left_run(tmp_path / "a", {"window": None})], tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert len(axes.get_lines()) == 2
    assert axes.get_ylabel() == "loss (nats per token)"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    with pytest.raises(PictureError, match="holds no loss"):
        curves.plot_losses([tmp_path / "b"], tmp_path / "x.png")
    pyplot().close("all")
