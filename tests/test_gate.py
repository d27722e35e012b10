"""The gate is one thing wherever it runs, and what it leaves to --full is more of the same."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import FULL, ROUND, load_profile, random_cases
from support.order import LONGEST_FIRST, TESTS

ROOT = TESTS.parent
SCRIPT, FAULTS = "./scripts/test.sh", "./scripts/faults.sh"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def hooks() -> list[dict[str, Any]]:
    """What runs before a commit."""
    return [
        hook for repository in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repository["hooks"]
    ]


def test_everyone_runs_the_script() -> None:
    """README's second block and both CI configurations run it, these the faults after it, and no step of their own."""
    assert re.findall(r"```bash\n(.*?)```", read("README.md"), re.DOTALL)[1].strip() == SCRIPT
    workflow = yaml.safe_load(read(".github/workflows/gate.yml"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert [command.split()[0] for command in commands] == [SCRIPT, FAULTS]
    assert re.findall(r'^(?:exec )?"\$scripts/(\S+)"', read(".ci/run"), re.MULTILINE) == ["test.sh", "faults.sh"]


def test_a_commit_is_checked_by_the_scripts_quick_steps() -> None:
    """All that comes before the tests, in the same order, from the environment that the script makes."""
    before = read("scripts/test.sh").partition("source scripts/setup.sh dev\n")[2].partition("OMP_NUM_THREADS")[0]
    steps = before.replace(" --check", "").split("\n")
    assert [hook["entry"] for hook in hooks()] == [f".venv/bin/{step}" for step in steps if step]


def test_the_longest_files_are_there() -> None:
    """A file that was renamed would start last, and the gate would wait for it."""
    assert [name for name in LONGEST_FIRST if not (TESTS / name).is_file()] == []


@pytest.fixture
def profile() -> Iterator[None]:
    """Puts the profile of the whole run back."""
    loaded = settings.get_current_profile_name()
    yield
    load_profile(loaded == FULL)


def drawn(full: bool) -> list[tuple[int, int]]:
    cases = []

    @random_cases(500)
    @given(st.tuples(st.integers(), st.integers()))
    def draw(case: tuple[int, int]) -> None:
        cases.append(case)

    load_profile(full)
    draw()
    return cases


@pytest.mark.usefixtures("profile")
def test_the_gates_cases_are_the_first_of_the_full_runs() -> None:
    """200 in the gate, the same on every run, and at least the 500 that were named under --full."""
    gate, full = drawn(full=False), drawn(full=True)
    assert len(gate) == ROUND
    assert gate == drawn(full=False)
    assert gate == full[:ROUND]
    assert len(full) >= 500
    assert len(set(full)) > 2 * len(set(gate))
