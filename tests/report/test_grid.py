"""`train --grid`: every combination once, in a folder of its own, checked before any is started."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cases import full_run
from typer.testing import CliRunner

from megatron_sep.cli import app
from megatron_sep.config import ConfigError, RunConfig, load_config, to_yaml
from megatron_sep.config.grid import grid_jobs
from megatron_sep.errors import StoppedError
from megatron_sep.report import grid
from megatron_sep.report.grid import GridError, run_jobs, slurm_array
from megatron_sep.report.runs import list_runs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm_pretrain.sbatch"


@pytest.fixture
def run_yaml(tiny: Callable[..., RunConfig], tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(tiny()))
    return path


def test_every_combination_is_a_job_in_a_folder_of_its_own(run_yaml: Path) -> None:
    """Of axes behind --grid and among the words; what has one value, or commas inside brackets, is shared by all."""
    words = ["optimizer.lr=6e-4,1e-3", "data.split=[0.8,0.2,0]", "train.steps=2"]
    jobs = grid_jobs(run_yaml, ["attention.window=4,8,null"], words)
    base = load_config(run_yaml)
    found = [load_config(run_yaml, job.words) for job in jobs]
    assert [(c.attention.window, c.optimizer.lr) for c in found] == [
        (window, lr) for window in (4, 8, None) for lr in (6e-4, 1e-3)
    ]
    assert {config.data.split for config in found} == {(0.8, 0.2, 0.0)}
    assert {config.train.steps for config in found} == {2}
    assert [config.dir for config in found] == [job.dir for job in jobs]
    assert len({job.dir for job in jobs}) == 6
    assert jobs[0].dir == base.dir / "window-4_lr-6e-4"


def test_values_with_brackets_and_keys_of_one_name_are_told_apart(run_yaml: Path) -> None:
    """A list is one value; two keys that end alike are written out."""
    jobs = grid_jobs(run_yaml, ["attention.full_layers=[0],[0,-1]", "train.seed=1,2", "data.seed=3,4"], [])
    assert len(jobs) == 8
    assert jobs[0].name == "full_layers-0_train.seed-1_data.seed-3"
    assert load_config(run_yaml, jobs[-1].words).attention.full_layers == (0, -1)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["attention.window"], "is written section.key=value,value"),
        (["attention.window=4,,8"], "is written section.key=value,value"),
        (["dir=a,b"], "each job has a dir of its own"),
        (["attention.window=4", "attention.window=8"], "stands there twice"),
        (["attention.window=4,4"], "two jobs would train in"),
        (["train.seed=" + ",".join(map(str, range(1001)))], "makes 1,001 jobs"),
        (["attention.window=4,-1", "optimizer.lr=1,x"], "window--1_lr-x"),
    ],
)
def test_what_is_no_grid_is_refused_at_once(run_yaml: Path, axes: list[str], message: str) -> None:
    """With all mistakes of all jobs."""
    with pytest.raises(ConfigError) as refused:
        grid_jobs(run_yaml, axes, [])
    assert message in str(refused.value)


def test_the_commands_are_printed_for_a_shell(run_yaml: Path) -> None:
    """Each is that of one job, whatever is in its words."""
    words = [
        "train",
        run_yaml,
        "--print",
        "--allow-change",
        "data",
        "--grid",
        "attention.window=4,8",
        "data.split=[1,0,0]",
    ]
    printed = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert printed.exit_code == 0
    jobs = grid_jobs(run_yaml, ["attention.window=4,8"], ["data.split=[1,0,0]"])
    begin = ["python", "-m", "megatron_sep", "train", "--allow-change", "data", str(run_yaml)]
    assert [shlex.split(line) for line in printed.stdout.splitlines()] == [[*begin, *job.words] for job in jobs]
    alone = CliRunner().invoke(app, ["train", str(run_yaml), "--slurm"], catch_exceptions=False)
    assert alone.exit_code == 2
    assert "--grid section.key=value,value: needs" in alone.stderr


def test_an_array_of_slurm_trains_the_job_of_its_number(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script of one run with each job's words, run here with stand-ins for SLURM's commands."""
    monkeypatch.chdir(ROOT)
    jobs = grid_jobs(run_yaml, ["attention.window=4,8"], ["train.steps=2"])
    text = slurm_array(SCRIPT.relative_to(ROOT), run_yaml, jobs)
    assert f" {ROOT}/scripts/train_torchrun.sh " in slurm_array(SCRIPT, run_yaml, jobs)  # of an installed wheel
    assert "#SBATCH --array=0-1" in text.splitlines()
    assert text.splitlines()[0] == "#!/usr/bin/env bash"
    body = SCRIPT.read_text().partition("set -uo pipefail\n")[2]
    assert body.strip() in text
    for name, program in {
        "python": f'exec {sys.executable} "$@"',
        "scontrol": "echo here",
        "srun": 'shift; printf "%s\\n" "$@" >"$SEEN"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "array.sh").write_text(text)
    slurm = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1"}
    ours = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SEEN": str(tmp_path / "seen"),
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(["bash", tmp_path / "array.sh"], check=True, env=os.environ | slurm | ours, cwd=ROOT, timeout=60)
    assert (tmp_path / "seen").read_text().splitlines() == ["scripts/train_torchrun.sh", str(run_yaml), *jobs[1].words]
    assert jobs[1].dir.is_dir()


def test_a_script_that_is_not_there_or_is_another_one_is_refused(run_yaml: Path, tmp_path: Path) -> None:
    """The way in is named."""
    jobs = grid_jobs(run_yaml, ["attention.window=4,8"], [])
    with pytest.raises(GridError, match="cannot be read"):
        slurm_array(tmp_path / "gone", run_yaml, jobs)
    with pytest.raises(GridError, match="has no line 'set -uo pipefail'"):
        slurm_array(run_yaml, run_yaml, jobs)


@pytest.mark.parametrize(("codes", "outcome"), [([0, 0], []), ([1, 0], ["window-4"]), ([0, 75], StoppedError)])
def test_a_job_that_fails_is_named_and_one_that_is_stopped_ends_the_grid(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int], outcome: Any
) -> None:
    """The others are still trained."""
    jobs = grid_jobs(run_yaml, ["attention.window=4,8"], [])
    left = list(codes)
    monkeypatch.setattr(grid.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), left.pop(0)))
    if outcome is StoppedError:
        with pytest.raises(StoppedError, match="stopped in job 2 of 2"):
            run_jobs(run_yaml, jobs)
    else:
        assert [job.name for job in run_jobs(run_yaml, jobs)] == outcome
    assert left == []


def test_a_grid_does_not_start_inside_a_job(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank would start all of it."""
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(GridError, match="start each with torchrun"):
        run_jobs(run_yaml, grid_jobs(run_yaml, ["attention.window=4,8"], []))


@pytest.mark.skipif(not full_run(), reason="two trainings; run with --full")
def test_a_grid_is_trained(run_yaml: Path) -> None:
    """From the command line to the list of its runs."""
    words = ["--grid", "attention.window=4,6", "train.steps=2", "train.eval_every=0"]
    command = [sys.executable, "-m", "megatron_sep", "train", str(run_yaml), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 of 2 jobs done"
    found = list_runs(load_config(run_yaml).dir)
    assert [(run.name, run.state, run.step) for run in found] == [("window-4", "done", 2), ("window-6", "done", 2)]
