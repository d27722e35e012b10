"""The site has every page once, its links lead somewhere, and it builds without a warning."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from support.cases import full_run
from support.pages import PAGES, ROOT

from megatron_sep.config.schema import RunConfig

FENCED = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


class Loader(yaml.SafeLoader):
    """Of mkdocs.yml, whose tags of Python are not looked at."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_site"] = module
    spec.loader.exec_module(module)
    return module


def named(nav: Any) -> list[str]:
    """Pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in named(part)]


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and the site make them."""
    return {
        re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())
        for heading in HEADING.findall(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    }


def test_every_page_is_in_the_navigation_once(hooks: ModuleType) -> None:
    """Those in docs/, those beside the code, and those that are made; and nothing else."""
    nav = named(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    made = {"settings.md", *hooks.ELSEWHERE.values(), *(f"api/{name}.md" for name in hooks.API)}
    assert sorted(nav) == sorted(written | made)
    assert {ROOT / source for source in hooks.ELSEWHERE} | {ROOT / "README.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path, hooks: ModuleType) -> None:
    """To a file of the repository or a page of the site, and to a heading that it has."""
    beside = {made: ROOT / source for source, made in hooks.ELSEWHERE.items()}
    made = {ROOT / "docs" / "settings.md", *(ROOT / "docs" / f"api/{name}.md" for name in hooks.API)}
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", FENCED.sub("", page.read_text())):
        meant = Path(os.path.normpath(page.parent / target)) if target else page
        if meant.is_relative_to(ROOT / "docs"):
            meant = beside.get(meant.relative_to(ROOT / "docs").as_posix(), meant)
        assert meant.exists() or meant in made, f"{target}: no such file"
        assert not anchor or anchor in anchors(meant), f"{target}#{anchor}: no such heading"


def settings(section: type[BaseModel], hooks: ModuleType, prefix: str = "") -> set[str]:
    """Every key of a section, and of those in it."""
    keys = set()
    for name, field in section.model_fields.items():
        inner = list(hooks.sections_in(field.annotation))
        keys |= {f"{prefix}{name}"}.union(*(settings(each, hooks, f"{prefix}{name}.") for each in inner))
    return keys


def test_the_settings_page_has_every_setting(hooks: ModuleType) -> None:
    """A row or a section of its own for each, in words instead of Python."""
    page = hooks.settings_page()
    missing = {key for key in settings(RunConfig, hooks) if f"| `{key}` |" not in page and f"## {key}\n" not in page}
    assert missing == set()
    assert "| `attention.window` | integer, > 0 or null | `null` |" in page
    assert not re.search(r"typing|<class|Annotated|object at", page)


@pytest.mark.skipif(not full_run(), reason="builds all pages, a minute; run with --full")
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    """And the pages of the API have docstrings, the copies of pages elsewhere their links."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    site = tmp_path / "site"
    assert "Query i sees key j iff" in (site / "api" / "attention" / "index.html").read_text()
    assert 'href="../design/"' in (site / "contributing" / "index.html").read_text()
    assert (site / "notebooks" / "small-cache.ipynb").is_file()
