"""The optimizer is the row that was chosen, whatever else is installed; each installation is a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.fakes import INSTALLED

SCRIPT = Path(__file__).with_name("optimizer_run.py")
ROOT = SCRIPT.parents[2]
PACKAGES = ["apex", "transformer_engine"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What optimizer_run finds with neither package ("torch") and with each, by rows before and after a checkpoint."""
    folder = tmp_path_factory.mktemp("optimizer")
    pairs = {
        package: ["auto:auto", f"{package}:{package}", f"auto:{package}", f"{package}:auto"] for package in PACKAGES
    }
    return {name: found(folder / name, name, pairs) for name, pairs in ({"torch": ["auto:auto"]} | pairs).items()}


def found(folder: Path, package: str, pairs: list[str]) -> dict[str, Any]:
    folder.mkdir()
    paths = [ROOT, ROOT / "tests", INSTALLED / f"with_{package}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*map(str, paths), *sys.path])}
    command = [sys.executable, str(SCRIPT), str(folder), *pairs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert said["megatron-core"] == package  # what it would take, left to itself
    return said


@pytest.mark.parametrize("package", PACKAGES)
def test_auto_is_torchs_fused_one_whatever_is_installed(package: str, runs: dict[str, Any]) -> None:
    """Weights, moments and what a checkpoint brings back are bit for bit those of a run without the package."""
    alone, there = runs["torch"]["auto:auto"], runs[package]["auto:auto"]
    assert there["taken"] == alone["taken"] == ["torch", "torch"]
    assert set(there["fused"]) == {True}
    assert len({*there["digests"], *alone["digests"]}) == 1


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_own_is_taken_by_name(package: str, runs: dict[str, Any]) -> None:
    """It learns what torch's learns, and goes on from its checkpoint bit for bit."""
    there = runs[package][f"{package}:{package}"]
    assert there["taken"] == [package, package]
    assert there["digests"][0] == there["digests"][1]
    assert there["norms"][0] == pytest.approx(runs["torch"]["auto:auto"]["norms"][0], rel=1e-5)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_run_may_go_on_with_another_row(package: str, runs: dict[str, Any]) -> None:
    """A checkpoint of one is a checkpoint of the other: moments and the number of the step carry over."""
    expected = pytest.approx(runs["torch"]["auto:auto"]["norms"][0], rel=1e-5)
    there, back = runs[package][f"auto:{package}"], runs[package][f"{package}:auto"]
    assert (there["taken"], back["taken"]) == (["torch", package], [package, "torch"])
    assert set(back["fused"]) == {True}
    assert there["norms"][1] == expected
    assert back["norms"][1] == expected
