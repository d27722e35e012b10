"""The blocks of a page run as they stand, with tiny models under the names that they give."""

from pathlib import Path

import pytest
from support.cases import full_run
from support.pages import ROOT, blocks, furnish, run_page, shell

DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
QUICK = {"extend", "notebooks"}
"""Run in the gate; the others take longer."""


def run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    furnish(folder)
    monkeypatch.chdir(folder)
    return run_page(page, folder)


def pages(quick: bool) -> list[object]:
    return [pytest.param(page, id=page.stem) for page in TUTORIALS if (page.stem in QUICK) == quick]


@pytest.mark.usefixtures("no_compilations")
@pytest.mark.parametrize("page", pages(quick=True))
def test_a_tutorial(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block that is not marked as only read."""
    run(page, tmp_path, monkeypatch)


@pytest.mark.skipif(not full_run(), reason="trains, compiles, decodes; run with --full")
@pytest.mark.usefixtures("no_compilations")
@pytest.mark.parametrize("page", [*pages(quick=False), pytest.param(DOCS / "quickstart.md", id="quickstart")])
def test_a_longer_tutorial(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same."""
    run(page, tmp_path, monkeypatch)


@pytest.mark.skipif(not full_run(), reason="computes all that is exact; run with --full")
def test_the_exact_part_of_the_reproduction(tmp_path: Path) -> None:
    """Without a run."""
    said = run_page(DOCS / "reproduction.md", tmp_path)
    assert "Table 3" in said


@pytest.mark.skipif(not full_run(), reason="decodes and evaluates; run with --full")
@pytest.mark.parametrize("name", ["inference", "evaluation"])
def test_a_page_about_a_trained_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the quickstart, in four steps."""
    if name == "evaluation":
        pytest.importorskip("lm_eval", reason="needs lm-eval: the extra `eval`")
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    shell("megatron_sep quickstart", tmp_path)
    (tmp_path / "piqa.jsonl").write_text('{"query": "A cat", "choices": ["sleeps.", "flies."], "gold": 0}\n' * 4)
    run_page(DOCS / f"{name}.md", tmp_path)


def test_what_is_only_read_is_said_and_no_more_than_that() -> None:
    """Python is always run, and of the commands all but those that install."""
    for page in [*TUTORIALS, DOCS / "quickstart.md", DOCS / "install.md"]:
        marked = [block for block in blocks(page) if block.needs]
        assert all(block.language == "bash" and block.needs.startswith("installs") for block in marked), page
