"""A training on two GPUs of which one process is killed or frozen: the other names it, and the job goes on exactly."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.ports import free_port

from megatron_sep.config import RunConfig, to_yaml
from megatron_sep.train.written import read_jsonl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
STEPS = 40
MINUTES = 0.5
"""Of parallel.timeout_minutes: after so long without a sign a process is lost."""


@dataclass(frozen=True)
class Trial:
    """What befalls rank 1."""

    how: signal.Signals
    step: int
    saving: bool = False
    """While a checkpoint is written, the first after that step."""


TRIALS = {
    "killed in step 5": Trial(signal.SIGKILL, 5),
    "killed in step 23": Trial(signal.SIGKILL, 23),
    "killed in a save": Trial(signal.SIGKILL, 10, saving=True),
    "frozen in step 17": Trial(signal.SIGSTOP, 17),
    "frozen in a save": Trial(signal.SIGSTOP, 20, saving=True),
}


def launch(config: Path, run: Path) -> list[subprocess.Popen[str]]:
    """Both processes of a job, without a launcher that would end the other one."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    run.mkdir(exist_ok=True)
    return [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_sep", "train", str(config), f"dir={run}"],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=(run.parent / f"{run.name}-{rank}.txt").open("a"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def wait(job: list[subprocess.Popen[str]], run: Path) -> None:
    codes = [process.wait(timeout=300) for process in job]
    assert codes == [0, 0], [(run.parent / f"{run.name}-{rank}.txt").read_text()[-2000:] for rank in range(2)]


def numbers(run: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [
        (line["train/loss"], line["train/grad_norm"])
        for line in read_jsonl(run / "metrics.jsonl")
        if "train/loss" in line
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lost")


@pytest.fixture
def config(folder: Path, tiny: Callable[..., RunConfig]) -> Path:
    """Deterministic, in bf16, with a save in the background every 10 steps; "straight" is a run of it."""
    path = folder / "run.yaml"
    if not path.exists():
        found = tiny(
            model={"num_layers": 4, "hidden_size": 256, "sequence_length": 512},
            train={"steps": STEPS, "precision": "bf16", "deterministic": True, "eval_every": 0, "compile": "off"},
            checkpoint={"every": 10, "keep": 2},
            parallel={"timeout_minutes": MINUTES},
        )
        path.write_text(to_yaml(found))
        wait(launch(path, folder / "straight"), folder / "straight")
    return path


def until(trial: Trial, run: Path) -> None:
    """The moment of a trial."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        steps = [line["step"] for line in read_jsonl(run / "metrics.jsonl")]
        written = any((run / "checkpoints").glob("step-*.partial"))
        if steps and steps[-1] >= trial.step and (written or not trial.saving):
            return
        time.sleep(0.001)
    raise AssertionError(f"{trial}: the moment never came")


@pytest.mark.parametrize("name", TRIALS)
def test_the_other_names_it_and_the_job_goes_on_exactly(name: str, config: Path, folder: Path) -> None:
    """The survivor ends within the time that is set; losses and norms of all steps equal the straight run's bits."""
    trial, run = TRIALS[name], folder / name.replace(" ", "-")
    job = launch(config, run)
    until(trial, run)
    lost_at = time.monotonic()
    job[1].send_signal(trial.how)
    assert job[0].wait(timeout=240) != 0
    took = time.monotonic() - lost_at
    job[1].kill()
    job[1].wait()
    said = (folder / f"{run.name}-0.txt").read_text()
    assert f"rank 1 (process {job[1].pid}" in said, said[-2000:]
    assert took < 60 * MINUTES + 20, took
    wait(launch(config, run), run)
    assert numbers(run) == numbers(folder / "straight")
    print(f"{name}: named after {took:.1f} s")
