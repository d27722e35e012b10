"""Two processes save beside their steps and stop together, whatever befalls one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from support.cases import full_run
from support.forked import run_job

from megatron_sep.config import RunConfig, to_yaml
from megatron_sep.train.written import read_history, read_jsonl
from megatron_sep.weights.sealed import fault_of, finished_checkpoints

SLOW = 1.5
"""Seconds that rank 1 writes longer, as two_ranks.py has it."""
EXACT = ("step", "train/loss", "train/grad_norm", "train/lr", "train/consumed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two-ranks")


@pytest.fixture
def runs(folder: Path, tiny: Callable[..., RunConfig]) -> Path:
    """A directory with a run of each case of two_ranks.py, made once for the module."""
    if not (folder / "run.yaml").exists():
        sections = {
            "train": {"steps": 8, "eval_every": 0, "compile": "off"},
            "checkpoint": {"every": 2},
            "parallel": {"tensor": 2},  # both have something to write
        }
        (folder / "run.yaml").write_text(to_yaml(tiny(**sections)))
        run_job(2, Path(__file__).with_name("two_ranks.py"), folder, folder / "run.yaml", folder=folder)
    return folder


def numbers(run_dir: Path) -> list[dict[str, float]]:
    lines = read_jsonl(run_dir / "metrics.jsonl")
    return [{key: line[key] for key in EXACT} for line in lines if "train/loss" in line]


def steps_saved(run_dir: Path) -> list[int]:
    found = finished_checkpoints(run_dir / "checkpoints")
    assert [fault_of(path) for path in found] == [None] * len(found)
    return [int(path.name.removeprefix("step-")) for path in found]


def ends(runs: Path, name: str) -> list[str]:
    return list(json.loads((runs / f"{name}.json").read_text()))


def test_saving_beside_the_steps_changes_no_number(runs: Path) -> None:
    """The same losses and the same checkpoints as of a run that waits for each; both ranks' sums are in the seal."""
    assert ends(runs, "beside") == ends(runs, "waited") == ["done", "done"]
    assert numbers(runs / "beside") == numbers(runs / "waited")
    assert steps_saved(runs / "beside") == steps_saved(runs / "waited") == [2, 4, 6, 8]
    for step in (2, 4, 6, 8):
        first, second = (runs / name / "checkpoints" / f"step-{step:08d}" for name in ("beside", "waited"))
        files = [json.loads((path / "manifest.json").read_text())["files"] for path in (first, second)]
        tensors = [{n: r["sha256"] for n, r in found.items() if n.endswith(".distcp")} for found in files]
        assert tensors[0] == tensors[1]
        assert {name[:4] for name in tensors[0]} == {"__0_", "__1_"}


def test_a_signal_to_one_process_stops_both_at_the_same_step(runs: Path) -> None:
    """Received by rank 1 in step 3: heard by both in step 5; what follows gives the uninterrupted numbers."""
    first, second = ends(runs, "stopped")
    assert first.startswith("StoppedError: step 5 of 8: asked to by another process: saved and stopped")
    assert second.startswith("StoppedError: step 5 of 8: SIGTERM: saved and stopped")
    assert steps_saved(runs / "stopped") == [2, 4, 5, 6, 8]
    assert numbers(runs / "stopped") == numbers(runs / "beside")


def test_a_checkpoint_is_sealed_once_the_slowest_process_has_written(runs: Path) -> None:
    """Rank 1 takes a second and a half: the steps go on, two are never on their way at once, and all are whole."""
    assert ends(runs, "slow") == ["done", "done"]
    assert steps_saved(runs / "slow") == [3, 6, 8]
    lines = read_jsonl(runs / "slow" / "metrics.jsonl")
    whole = [line["time/save_whole"] for line in lines if "time/save_whole" in line]
    assert sum(whole) >= 3 * SLOW
    assert numbers(runs / "slow") == numbers(runs / "beside")


def test_a_save_that_fails_on_one_process_is_told_and_training_goes_on(runs: Path) -> None:
    """The disk of rank 1 takes nothing of step 2: both ranks go on, it is written down, the next saves are whole."""
    assert ends(runs, "full") == ["done", "done"]
    assert steps_saved(runs / "full") == [4, 6, 8]
    assert numbers(runs / "full") == numbers(runs / "beside")
    (failed,) = [line for line in read_history(runs / "full") if line["event"] == "save failed"]
    assert failed["step"] == 2
    assert "No space left on device" in failed["message"]
    assert not list((runs / "full" / "checkpoints").glob("*.partial"))


def test_a_run_that_is_cut_off_while_a_checkpoint_is_on_its_way_goes_on_from_the_one_before(runs: Path) -> None:
    """The power goes in step 5, before step 4 is sealed: on from step 2, with the uninterrupted numbers."""
    assert ends(runs, "cut") == ["powered off", "powered off"]
    (resumed,) = [line for line in read_history(runs / "cut") if line["event"] == "resume"]
    assert resumed["checkpoint"] == "step-00000002"
    assert numbers(runs / "cut") == numbers(runs / "beside")
    assert steps_saved(runs / "cut") == [2, 4, 6, 8]
    assert not list((runs / "cut" / "checkpoints").glob("*.partial"))


@pytest.mark.skipif(not full_run(), reason="starts two processes seven times; run with --full")
def test_two_processes_killed_at_any_moment_go_on_exactly(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Six SIGKILLs of both, at random moments of 40 steps with a save every two: the uninterrupted numbers."""
    random, cut = Random(0), tmp_path / "cut"
    config = tiny(train={"steps": 40, "eval_every": 0}, checkpoint={"every": 2, "keep": 3}, parallel={"tensor": 2})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert started(tmp_path / "run.yaml", tmp_path / "straight").wait(timeout=600) == 0
    for kill in range(6):
        job = started(tmp_path / "run.yaml", cut)
        while len(numbers(cut)) < 6 * kill + 3 and job.poll() is None:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 1))
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert started(tmp_path / "run.yaml", cut).wait(timeout=600) == 0
    assert numbers(cut) == numbers(tmp_path / "straight")
    assert steps_saved(cut) == [36, 38, 40]


def started(config: Path, folder: Path) -> subprocess.Popen[bytes]:
    """`train` on two processes, in a process group of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.Popen(
        [*torchrun, "-m", "megatron_sep", "train", str(config), f"dir={folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


def test_a_slow_process_is_named(runs: Path) -> None:
    """Rank 1 takes longer for its micro-batches: named with both times, and in the metrics of the line."""
    named = next(line for line in read_history(runs / "lagging") if line["event"] == "slow rank")
    assert (named["step"], named["rank"]) == (2, 1)
    assert named["process"].startswith("rank 1 (process ")
    assert named["seconds"] > 0.5 + named["others"]
    lines = [line for line in read_jsonl(runs / "lagging" / "metrics.jsonl") if "speed/slowest_rank" in line]
    assert (lines[0]["step"], lines[0]["speed/slowest_rank"]) == (2, 1)
