"""The reports of the repository are what this program makes of the runs beside them."""

import json
from pathlib import Path

import pytest

from megatron_sep.reproduce.item import Inputs
from megatron_sep.reproduce.items import ITEMS, chosen
from megatron_sep.reproduce.write import to_json, to_markdown

REPORTS = Path(__file__).parents[2] / "reports"
RUNS = REPORTS / "runs"
OF_RUNS = (
    "table2",
    "table3",
    "table9",
    "table10",
    "table15",
    "table17",
    "figure1",
    "figure5",
    "figure6",
    "figure8",
    "figure9",
)
OF_NOTHING = ("table1", "table11", "table12", "table13", "figure3", "figure4", "figure7")


@pytest.mark.parametrize("name", [*OF_RUNS, *OF_NOTHING])
def test_a_report_follows_from_its_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last digit: numbers, notes and text."""
    monkeypatch.chdir(REPORTS.parent)
    runs = RUNS.relative_to(REPORTS.parent) if name in OF_RUNS else None
    ((item, make),) = chosen([name])
    result = make(Inputs(runs))
    found = json.loads((REPORTS / f"{name}.json").read_text())
    assert json.loads(to_json(item, result)) == found
    assert (REPORTS / f"{name}.md").read_text() == to_markdown(item, result)
    assert all((REPORTS / f"{picture}{suffix}").exists() for picture in result.figures for suffix in (".png", ".svg"))


def test_pictures_and_links_are_there() -> None:
    """Each report has the title of its item, and each picture that it shows lies beside it."""
    titles = {item.name: item.title for item in ITEMS}
    for report in REPORTS.glob("*.md"):
        text = report.read_text()
        assert text.startswith(f"# {titles[report.stem]}")
        for line in text.splitlines():
            if line.startswith("!["):
                assert (REPORTS / line.split("(")[1].rstrip(")")).exists()
