"""`tools/recompute_run.py` finds the numbers of a run again, and a number that is not the run's."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sep.config import RunConfig
from megatron_sep.parallel.groups import topology

pytestmark = pytest.mark.usefixtures("single_process")

TOOL = Path(__file__).parents[2] / "tools" / "recompute_run.py"


def recompute(run: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), str(run)], capture_output=True, text=True, timeout=300)


@pytest.fixture
def trained(tiny: Callable[..., RunConfig]) -> Path:
    """A run with documents kept apart whose last checkpoint has a training line after it."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    config = tiny(
        attention={"document_boundaries": True, "stride": 7}, train={"eval_batches": 2}, checkpoint={"every": 5}
    )
    train(build_run(config, topology()))
    newest = config.dir / "checkpoints" / "step-00000008"
    newest.rename(config.dir / "step-00000008")  # as if the run had been stopped between two checkpoints
    return config.dir


def test_every_number_is_found_again(trained: Path) -> None:
    """Learning rate, consumed, visible share, density, operations, tokens, and the loss of the step that follows."""
    done = recompute(trained)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("train/lr", "train/consumed", "attention/visible", "operations", "train/loss_last of the next step"):
        assert name in done.stdout


@pytest.mark.parametrize("key", ["train/lr", "attention/visible", "train/loss_last", "speed/model_flops"])
def test_a_number_that_is_not_the_runs_is_marked(trained: Path, key: str) -> None:
    """A line that was changed by a ten-thousandth fails."""
    path = trained / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if key in line:
            line[key] *= 1.0001
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = recompute(trained)
    assert done.returncode == 1
    assert done.stdout.count("<-- differs") == 1
