"""A process of a job that is killed, freezes, fails or never comes ends the others, and they name it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support.ports import free_port

MINUTES = 0.25
"""After which a process that gives no sign is lost: 15 seconds, on a machine that others use too."""


@dataclass
class Job:
    """The processes of a job, by rank."""

    ranks: list[subprocess.Popen[str]]
    lost_at: float = 0.0
    ended: dict[int, float] = field(default_factory=dict)
    """Seconds from the loss to the end of each rank that ended."""

    def begin(self) -> None:
        """Let the ranks join the job."""
        for process in self.ranks:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in self.ranks:
            process.stdin.write("\n")
            process.stdin.flush()

    def lose(self, rank: int, how: signal.Signals) -> None:
        """Send a signal to a rank, once all work."""
        for process in self.ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "working\n"
        self.ranks[rank].send_signal(how)
        self.lost_at = time.monotonic()

    def look(self) -> None:
        for rank, process in enumerate(self.ranks):
            if process.poll() is not None:
                self.ended.setdefault(rank, time.monotonic() - self.lost_at)

    def end_of(self, rank: int) -> tuple[int, str]:
        """Exit code, and what was said."""
        _, said = self.ranks[rank].communicate(timeout=120)
        return self.ranks[rank].returncode, said


def start(ranks: int, size: int = 0, fail: int = -1, backend: str = "gloo") -> Job:
    """``ranks`` processes of a job of ``size``; rank ``fail`` raises an error."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size or ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = str(Path(__file__).with_name("lost_peer.py"))
    return Job(
        [
            subprocess.Popen(
                [sys.executable, script, str(MINUTES), backend, *(["fail"] if rank == fail else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment | {"RANK": str(rank)},
            )
            for rank in range(ranks)
        ]
    )


@pytest.fixture(scope="module")
def jobs() -> Iterator[dict[str, Job]]:
    """Jobs of two that run side by side until what befell each has ended them."""
    lost = {"killed 0": (0, signal.SIGKILL), "killed 1": (1, signal.SIGKILL)}
    lost |= {"frozen 0": (0, signal.SIGSTOP), "frozen 1": (1, signal.SIGSTOP)}
    found = {name: start(2) for name in lost} | {"failed": start(2, fail=1), "absent": start(1, size=2)}
    for job in found.values():
        job.begin()
    for name, (rank, how) in lost.items():
        found[name].lose(rank, how)
    end = time.monotonic() + 120
    ends = {name: 1 if name.startswith(("frozen", "absent")) else 2 for name in found}
    while time.monotonic() < end and any(len(job.ended) < ends[name] for name, job in found.items()):
        for job in found.values():
            job.look()
        time.sleep(0.05)
    yield found
    for job in found.values():
        for process in job.ranks:
            process.kill()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_is_named_within_seconds(jobs: dict[str, Job], lost: int) -> None:
    """Also where it is the first one, which keeps the store that the others ask."""
    job = jobs[f"killed {lost}"]
    code, said = job.end_of(1 - lost)
    assert code == 1
    assert f"error: rank {lost} (process {job.ranks[lost].pid} of {os.uname().nodename}) is gone: it was killed" in said
    assert f"Rank {1 - lost} waited for it, in step 7. Start again: the run goes on from its newest checkpoint" in said
    job.look()
    assert job.ended[1 - lost] < 60 * MINUTES


@pytest.mark.parametrize("lost", [0, 1])
def test_a_frozen_process_is_named_within_the_time_that_was_set(jobs: dict[str, Job], lost: int) -> None:
    """SIGSTOP: it is there, its connections stand, and it says nothing more."""
    job = jobs[f"frozen {lost}"]
    code, said = job.end_of(1 - lost)
    assert code == 1
    assert "has given no sign of life for" in said or "keeps the job's store, does not answer" in said
    assert f"error: rank {lost} (process {job.ranks[lost].pid}" in said
    assert f"Rank {1 - lost} waited for it, in step 7" in said
    assert job.ended[1 - lost] < 60 * MINUTES + 20


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("how", "what"), [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "no sign of life")])
def test_a_process_lost_on_gpus_is_named(how: signal.Signals, what: str) -> None:
    """nccl itself waits without a word; rank 0 names rank 1 within the time that was set."""
    job = start(2, backend="nccl")
    job.begin()
    job.lose(1, how)
    try:
        code, said = job.end_of(0)
        job.look()
    finally:
        job.ranks[1].kill()
    assert code == 1
    assert f"error: rank 1 (process {job.ranks[1].pid}" in said
    assert what in said
    assert job.ended[0] < 60 * MINUTES + 20


def test_the_error_of_one_process_is_told_by_all(jobs: dict[str, Job]) -> None:
    """The one that failed says what was wrong, and the other says whose error it is."""
    job = jobs["failed"]
    own, others = job.end_of(1), job.end_of(0)
    assert own == (9, "error: a number that cannot be\n")
    assert others[0] == 1
    assert f"rank 1 (process {job.ranks[1].pid} of {os.uname().nodename}) failed: a number that cannot be" in others[1]


def test_a_process_that_never_starts_is_named(jobs: dict[str, Job]) -> None:
    """A job of two of which one came."""
    code, said = jobs["absent"].end_of(0)
    assert code == 1
    assert "rank(s) 1 of 2 did not start within parallel.timeout_minutes" in said
