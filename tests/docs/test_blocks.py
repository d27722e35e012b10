"""The blocks of a page run as they stand, with tiny models under the names that they give."""

import re
import shutil
from pathlib import Path

import pytest
from support.cases import full_run
from support.pages import PAGES, ROOT, blocks, furnish, run_page, shell
from support.raw_text import furnish_raw_text

DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
QUICK = {"extend", "notebooks"}
"""Run in the gate; the others take longer."""
OTHERS = ("data", "evaluation", "inference", "parallelism", "quickstart", "reproduction", "workflow")
RUN = {ROOT / "README.md", *TUTORIALS, *(DOCS / f"{name}.md" for name in OTHERS)}
"""Pages with blocks that are run: the README's by test_readme.py, all others here."""
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
REASONS = ("installs", "needs", "takes")
COMMAND = re.compile(r"([A-Z_]+=\S+ )*((\./)?(scripts|tools)/\w|(python3?|pip|torchrun|megatron_sep|sbatch|make|uv) )")


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


def test_text_becomes_a_shard_that_a_step_reads(tmp_path: Path) -> None:
    """The page about data: its own YAML, sets in parts that are whole, what was in step 120."""
    furnish_raw_text(tmp_path, ROOT / "configs")
    said = run_page(DOCS / "data.md", tmp_path)
    assert (tmp_path / "data" / "corpus.manifest.json").is_file()
    assert "0 wrong, 0 without a checksum" in said
    assert (tmp_path / "joined" / "document.bin").read_bytes() == (tmp_path / "whole" / "document.bin").read_bytes()
    assert '"reach"' in said


def test_layouts_are_estimated(tmp_path: Path) -> None:
    """By formulae alone."""
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    assert "| llama-3-8b | 1024k | 8 | none fits |" in run_page(DOCS / "parallelism.md", tmp_path)


@pytest.mark.skipif(not full_run(), reason="trains a grid, opens a page, verifies; run with --full")
def test_a_day_with_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned, trained as a grid and as an array, listed, watched, drawn and verified."""
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    shell("megatron_sep quickstart", tmp_path)
    for name in "ab":
        shutil.copytree(tmp_path / "runs" / "quickstart", tmp_path / "runs" / name)
    said = run_page(DOCS / "workflow.md", tmp_path)
    assert "4 of 4 jobs done" in said
    assert "#SBATCH --array=0-1" in said
    assert said.rstrip().endswith("verified")
    assert (tmp_path / "loss.png").is_file()


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_is_only_read_is_said_and_no_more_than_that(page: Path) -> None:
    """Python and bash are run by a test or say why not; a page of tutorials leaves out what installs alone."""
    for block in blocks(page):
        if block.needs is None:
            assert page in RUN or block.language not in ("bash", "python"), block.text
        else:
            assert block.language == "bash", block.text
            assert block.needs.startswith("installs" if page in TUTORIALS else REASONS), block.needs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_command_stands_in_a_block_of_bash(page: Path) -> None:
    """Not in an indented one, nor in one of another language, where no test would find it."""
    indented = re.findall(r"^ {4}(\S.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    others = [line for block in blocks(page) if block.language != "bash" for line in block.text.splitlines()]
    assert [line for line in indented + others if COMMAND.match(line)] == []
