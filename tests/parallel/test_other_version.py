"""A checkpoint that was written under one version of megatron-core is taken up under the other, both ways.

Needs a second interpreter: MEGATRON_SEP_OTHER_PYTHON=/path/to/python pytest tests/parallel/test_other_version.py
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

import pytest
import torch
from parallel.resharding import MORE, STEPS
from parallel.test_resharding import content
from support.order import TESTS

from megatron_sep.config import RunConfig, to_yaml
from megatron_sep.train.written import read_jsonl

VARIABLE = "MEGATRON_SEP_OTHER_PYTHON"
OTHER = os.environ.get(VARIABLE, "")
SCRIPT = Path(__file__).with_name("resharding.py")
SETTINGS = {
    "fp32": [],
    "bf16": ["train.precision=bf16"],
    "muon": ["optimizer.kind=muon"],
    **({"zero2": ["parallel.engine=deepspeed", "parallel.zero_stage=2"]} if util.find_spec("deepspeed") else {}),
}
TOLERANCE = {"fp32": 1e-5, "zero2": 1e-5, "bf16": 1e-3, "muon": 1e-3}
"""Of losses and gradient norms; Muon multiplies in bf16."""
CASES = [(writer, kind) for writer in ("this", "other") for kind in SETTINGS]

pytestmark = [
    pytest.mark.usefixtures("single_process"),
    pytest.mark.skipif(not OTHER, reason=f"needs an interpreter with another megatron-core in {VARIABLE}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("versions")


@pytest.fixture
def runs(folder: Path, tiny: Callable[..., RunConfig]) -> Path:
    """A directory with what each version wrote, what it took up, and what it trained without a stop; made once."""
    if not (folder / "run.yaml").exists():
        assert version_of(OTHER) != metadata.version("megatron-core"), f"{VARIABLE}={OTHER} has the version of this one"
        schedule = {"decay_steps": STEPS + MORE}
        config = tiny(train={"eval_every": 0, "compile": "off"}, optimizer=schedule, checkpoint={"every": 99})
        (folder / "run.yaml").write_text(to_yaml(config))
        pythons = {"this": sys.executable, "other": OTHER}
        for name, python in pythons.items():
            trained = {f"{name} {kind}": settings for kind, settings in SETTINGS.items()}
            whole = {f"{written} straight": [*s, f"train.steps={STEPS + MORE}"] for written, s in trained.items()}
            start(python, folder, trained | whole)
        for name, python in (("this", OTHER), ("other", sys.executable)):
            start(python, folder, {f"{name} {kind}>on": settings for kind, settings in SETTINGS.items()})
    return folder


def version_of(python: str) -> str:
    """Which megatron-core an interpreter has."""
    command = [python, "-c", "from importlib.metadata import version; print(version('megatron-core'))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def start(python: str, folder: Path, runs: dict[str, list[str]]) -> None:
    """One process that trains the runs, or takes them up, one after another."""
    words = [word for name, settings in runs.items() for word in ("--", name, *settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    command = [python, str(SCRIPT), str(folder), str(folder / "run.yaml"), *words[1:]]
    subprocess.run(command, check=True, timeout=600, env=environment)


@pytest.mark.parametrize(("writer", "kind"), CASES)
def test_every_tensor_is_taken_up_as_it_was(runs: Path, writer: str, kind: str) -> None:
    """Saved again at once by the other version: weights, fp32 weights, moments and the step, bit for bit."""
    before, after = content(runs / f"{writer} {kind}"), content(runs / f"{writer} {kind}>on at once")
    assert after[1] == before[1] == STEPS
    assert after[0].keys() == before[0].keys()
    assert any(key.startswith("optimizer.state.") for key in before[0])
    for key, tensor in before[0].items():
        assert torch.equal(after[0][key], tensor), key


@pytest.mark.parametrize("straight", ["this", "other"])
@pytest.mark.parametrize(("writer", "kind"), CASES)
def test_the_run_goes_on_as_if_nothing_had_changed(runs: Path, writer: str, kind: str, straight: str) -> None:
    """Losses and gradient norms of the steps after it are those of either version that never stopped."""
    expected, found = (
        [line for line in read_jsonl(runs / name / "metrics.jsonl") if "train/loss" in line and line["step"] > STEPS]
        for name in (f"{straight} {kind} straight", f"{writer} {kind}>on")
    )
    assert [line["step"] for line in found] == [STEPS + 1, STEPS + MORE]
    for one, two in zip(expected, found, strict=True):
        for key in ("train/loss", "train/grad_norm", "train/consumed", "train/lr"):
            assert two[key] == pytest.approx(one[key], rel=TOLERANCE[kind]), key
