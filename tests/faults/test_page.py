"""docs/reliability.md says what there is: its tests exist, and its table is that of the result beside it."""

import json
import re
from pathlib import Path

import pytest

from faults.page import PageError, table, update, update_rows
from faults.table import FAULTS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"


def test_every_test_that_the_page_names_is_there() -> None:
    """Each of the invariants I1 to I10 names one or more, by file and function."""
    text = PAGE.read_text(encoding="utf-8")
    for part in re.split(r"\n(?=\*\*I\d+\*\*|## )", text.partition("## Invariants")[2])[1:]:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", part)
        assert named, part
        for file, function in named:
            assert re.search(rf"^def {function}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), function
    assert re.findall(r"^\*\*(I\d+)\*\*", text, re.MULTILINE) == [f"I{number}" for number in range(1, 11)]


def test_the_table_is_that_of_its_result() -> None:
    """Every fault that the program has, with no run that went on wrongly; no table without a result."""
    text, result = PAGE.read_text(encoding="utf-8"), PAGE.with_suffix(".json")
    if not result.is_file():
        assert "| F1 |" not in text
        return
    record = json.loads(result.read_text())
    assert table(record) in text
    assert [row["name"] for row in record["rows"]] == [fault.name for fault in FAULTS]
    assert sum(row["wrong"] for row in record["rows"]) == 0


def test_faults_have_their_places_in_the_matrix() -> None:
    """Numbered F1 to F22 in order, with more trials in the full run than in the fast one."""
    numbers = [int(fault.name[1:]) for fault in FAULTS]
    assert numbers == sorted(set(numbers))
    assert set(numbers) <= set(range(1, 23))
    assert all(0 < fault.fast < fault.full for fault in FAULTS)


def test_a_full_runs_table_is_not_replaced_by_a_smaller_one(tmp_path: Path) -> None:
    """A fast run after it leaves page and result as they are; a page without a place for the table is refused."""
    row = {"name": "F1", "what": "a", "how": "b", "expected": "c", "trials": 2, "survived": 2, "wrong": 0}
    whole = {"date": "2026-11-26", "machine": "m", "seconds": 2, "processor_seconds": 1}
    page, record = tmp_path / "page.md", whole | {"rows": [row | {"detect": 0.5, "recover": None}]}
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    update(page, record | {"full": True})
    written = page.read_text(encoding="utf-8")
    assert "| F1 | a | b | c | 2 | 2 | 0 | 0.50 s |  |" in written
    assert "keeps the table" in update(page, record | {"full": False, "seconds": 0})
    assert page.read_text(encoding="utf-8") == written
    page.write_text("nothing")
    with pytest.raises(PageError, match="has no lines"):
        update(page, record | {"full": True})


def test_a_fault_that_is_run_again_has_a_new_row(tmp_path: Path) -> None:
    """The other rows stay, the sums follow, and the page says which rows are of which run; only a full run's."""
    page, about = tmp_path / "page.md", {"date": "2026-11-26", "machine": "m", "seconds": 2, "processor_seconds": 1}
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    row = {"what": "a", "how": "b", "expected": "c", "trials": 4, "survived": 3, "wrong": 0, "detect": None}
    rows = [row | {"name": name, "recover": None} for name in ("F1", "F2")]
    with pytest.raises(PageError, match="pass --full"):
        update_rows(page, about | {"full": False, "rows": rows})
    update(page, about | {"full": True, "rows": rows})
    for machine in ("n", "k"):
        update_rows(page, about | {"full": True, "machine": machine, "rows": [rows[1] | {"survived": 4}]})
    written = page.read_text(encoding="utf-8")
    assert "| F1 | a | b | c | 4 | 3 | 0 |" in written
    assert "| F2 | a | b | c | 4 | 4 | 0 |" in written
    assert "8 trials, 7 survived" in written
    assert "F2 again on 2026-11-26, `./scripts/faults.sh` --full --only F2, k" in written
    assert "--only F2, n" not in written
