"""The jobs of a grid: one after another here, as commands, or as one SLURM array; torch-free."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sep.config.grid import Job, grid_jobs
from megatron_sep.config.shipped import shipped_script
from megatron_sep.errors import StoppedError, UserError

_STOPPED, _INTERRUPTED = 75, 130
_LAUNCHER = "train_torchrun.sh"
_AFTER = "set -uo pipefail\n"
"""The line of the SLURM script behind which a job's words are set."""


class GridError(UserError):
    """Jobs that cannot be started as asked."""


@dataclass(frozen=True)
class Wish:
    """What stands behind `train`."""

    config: Path | None
    axes: tuple[str, ...]
    """Of --grid."""
    words: tuple[str, ...]
    """Settings and further files, some of them with several values."""
    allow_change: tuple[str, ...] = ()
    from_neox: bool = False


def train_grid(wish: Wish, print_jobs: bool, slurm: bool) -> int:
    """Start the jobs of a grid one after another, or print them; the exit code. Raises ConfigError, GridError."""
    if wish.config is None or not wish.axes or wish.from_neox or (slurm and wish.allow_change):
        raise GridError(
            "--grid section.key=value,value: needs the YAML of a run, --print and --slurm need it, and it goes neither "
            "with --from-neox nor, under --slurm, with --allow-change"
        )
    jobs = grid_jobs(wish.config, wish.axes, wish.words)
    options = [word for key in wish.allow_change for word in ("--allow-change", key)]
    if slurm:
        print(slurm_array(shipped_script("slurm_pretrain.sbatch"), wish.config, jobs))
        return 0
    if print_jobs:
        print("\n".join(commands(wish.config, jobs, options)))
        return 0
    failed = run_jobs(wish.config, jobs, options)
    print("\n".join([f"{len(jobs) - len(failed)} of {len(jobs)} jobs done", *(f"failed: {job.dir}" for job in failed)]))
    return int(bool(failed))


def commands(config: Path, jobs: Sequence[Job], options: Sequence[str] = ()) -> list[str]:
    """A line for a shell each; ``options`` are further ones of `train`."""
    return [shlex.join(["python", "-m", "megatron_sep", "train", *options, str(config), *job.words]) for job in jobs]


def run_jobs(config: Path, jobs: Sequence[Job], options: Sequence[str] = ()) -> list[Job]:
    """Train one after another, each in a process of its own; those that failed. A job that is done says so and ends.

    Raises StoppedError where one was asked to stop, GridError inside a job of several processes.
    """
    if "RANK" in os.environ:
        raise GridError("--grid starts jobs itself: print them with --print, and start each with torchrun")
    failed = []
    for number, job in enumerate(jobs, 1):
        print(f"== job {number}/{len(jobs)}: {job.dir}", flush=True)
        words = [sys.executable, "-m", "megatron_sep", "train", *options, str(config), *job.words]
        code = subprocess.run(words, check=False).returncode
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        if code == _STOPPED:
            raise StoppedError(f"stopped in job {number} of {len(jobs)}; the same command goes on from here")
        if code:
            failed.append(job)
    return failed


def slurm_array(script: Path, config: Path, jobs: Sequence[Job]) -> str:
    """``script``, which trains one configuration under SLURM, as an array of these jobs. Raises GridError.

    A script that is named by its whole path finds its launcher beside itself, wherever it is submitted from.
    """
    try:
        text = script.read_text(encoding="utf-8")
    except OSError as error:
        raise GridError(f"{script}: cannot be read: {error.strerror}") from error
    head, found, body = text.partition(_AFTER)
    if not found:
        raise GridError(f"{script}: has no line {_AFTER.strip()!r}, behind which a job's words are set")
    if script.is_absolute():
        body = body.replace(f"scripts/{_LAUNCHER}", shlex.quote(str(script.with_name(_LAUNCHER))))
    settings = [line for line in head.splitlines() if line.startswith("#SBATCH") and "--output" not in line]
    cases = [f"{number}) set -- {shlex.join([str(config), *job.words])} ;;" for number, job in enumerate(jobs)]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# {len(jobs)} jobs of {config}, each in a dir of its own. Submit it as {script.name} itself.",
            *settings,
            f"#SBATCH --array=0-{len(jobs) - 1}",
            "#SBATCH --output=%x-%A-%a.log",
            _AFTER.rstrip(),
            'case "$SLURM_ARRAY_TASK_ID" in',
            *(f"    {case}" for case in cases),
            '    *) echo "no job $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;',
            "esac",
            body.rstrip(),
        ]
    )
