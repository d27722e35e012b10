"""The parity matrix: whatever is split, and whatever is recomputed, a job trains what one process trains (--full)."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from support.cases import full_run
from support.layouts import ATTENTIONS, LAYOUTS, Cell, cells
from support.saved import saved_tensors

from megatron_sep.config import RunConfig, load_config, to_yaml
from megatron_sep.parallel.groups import topology
from megatron_sep.train.written import read_jsonl

pytestmark = [
    pytest.mark.usefixtures("single_process"),
    pytest.mark.skipif(
        "not config.getoption('full')", reason="half an hour on two cores; test_two_processes.py has a part of it"
    ),
]
STEPS = 20
SECTIONS = {
    "model": {"num_layers": 4, "num_attention_heads": 4, "sequence_length": 256},
    "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "eval_every": 0, "compile": "off"},
    "optimizer": {"decay_steps": STEPS},
    "checkpoint": {"every": 1000},
}
CELLS_A_JOB = 6
"""Each layout leaves threads of gloo behind in its processes."""
PROCESSES = sorted({layout.processes for layout in LAYOUTS.values()})
FIRST_STEP = "train.steps=1"
"""A run of one step leaves a checkpoint with its gradients; then it goes on to the last."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture
def runs(request: pytest.FixtureRequest, folder: Path, tiny: Callable[..., RunConfig]) -> Path:
    """A directory with the runs of all cells that are asked for, and of one process; made once for the module."""
    if not (folder / "run.yaml").exists():
        (folder / "run.yaml").write_text(to_yaml(tiny(**SECTIONS)))
        for attention in ATTENTIONS:
            one = Cell("data 2", attention, "kept")
            for more in ([FIRST_STEP], []):
                train_here(folder, one.one, *one.settings, *more)
        asked = {item.callspec.params["cell"] for item in request.session.items if item.module is request.module}
        for processes in PROCESSES:
            of = [cell for cell in cells(processes) if cell in asked]
            with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // processes)) as jobs:
                list(jobs.map(partial(train_in_a_job, folder, processes), batched(of, CELLS_A_JOB)))
    return folder


def train_here(folder: Path, name: str, *overrides: str) -> None:
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    train(build_run(load_config(folder / "run.yaml", [f"dir={folder / name}", *overrides]), topology()))


def batched(of: Iterable[Cell], size: int) -> Iterator[list[Cell]]:
    cells = iter(of)
    while batch := list(islice(cells, size)):
        yield batch


def train_in_a_job(folder: Path, processes: int, of: Iterable[Cell]) -> None:
    words = [word for cell in of for more in ([FIRST_STEP], []) for word in ("--", cell.name, *cell.settings, *more)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    script = str(Path(__file__).with_name("train_layouts.py"))
    subprocess.run(
        [*torchrun, script, str(folder), str(folder / "run.yaml"), *words[1:]],
        check=True,
        timeout=7200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


CELLS = [cell for processes in PROCESSES for cell in cells(processes)] if full_run() else []


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_losses_of_twenty_steps_equal_those_of_one_process(runs: Path, cell: Cell) -> None:
    """Each within 1e-5, and so are the gradient norms and the visible share."""
    one, many = (logged(runs / name) for name in (cell.one, cell.name))
    assert list(one) == list(many) == list(range(1, STEPS + 1))
    for step, expected in one.items():
        for key in ("train/loss", "train/grad_norm", "attention/visible", "attention/separator_density"):
            assert many[step][key] == pytest.approx(expected[key], rel=1e-5), (step, key)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_gradient_of_the_first_step_equals_that_of_one_process(runs: Path, cell: Cell) -> None:
    """Adam's first moment after one step is the clipped gradient: each parameter's within 1e-5 of its norm."""
    one, many = (moments(runs / name) for name in (cell.one, cell.name))
    assert one.keys() == many.keys()
    assert len(one) == 12 * SECTIONS["model"]["num_layers"] + 4
    for name, expected in one.items():
        assert float((many[name] - expected).norm() / expected.norm()) < 1e-5, name


def logged(run: Path) -> dict[int, dict[str, float]]:
    """The status line of each step."""
    return {int(line["step"]): line for line in read_jsonl(run / "metrics.jsonl") if "train/loss" in line}


def moments(run: Path) -> dict[str, torch.Tensor]:
    """Adam's first moment of each parameter after the first step, the layers apart."""
    saved = saved_tensors(run / "checkpoints" / "step-00000001")
    found = {key: value for key, value in saved.items() if ".exp_avg." in key}
    layered = {key: value for key, value in found.items() if ".layers." in key}
    apart = {f"{key}[{i}]": layer for key, value in layered.items() for i, layer in enumerate(value)}
    return {key: value for key, value in found.items() if key not in layered} | apart
