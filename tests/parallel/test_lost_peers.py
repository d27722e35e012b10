"""A process of a job that is killed, freezes, fails or never comes ends the others, and they name it."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

MINUTES = 0.25
"""After which a process that gives no sign is lost: 15 seconds, on a machine that others use too."""


@dataclass
class Job:
    """The processes of a job, by rank."""

    ranks: list[subprocess.Popen[str]]

    def wait_until_they_work(self) -> None:
        for process in self.ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "working\n"

    def end_of(self, rank: int) -> tuple[int, str, float]:
        """Exit code, what was said, and the seconds until then."""
        begin = time.monotonic()
        _, said = self.ranks[rank].communicate(timeout=120)
        return self.ranks[rank].returncode, said, time.monotonic() - begin


def start(ranks: int, size: int = 0, fail: int = -1) -> Job:
    """``ranks`` processes of a job of ``size``; rank ``fail`` raises an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size or ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = str(Path(__file__).with_name("lost_peer.py"))
    return Job(
        [
            subprocess.Popen(
                [sys.executable, script, str(MINUTES), *(["fail"] if rank == fail else [])],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment | {"RANK": str(rank)},
            )
            for rank in range(ranks)
        ]
    )


@pytest.fixture(scope="module")
def jobs() -> dict[str, Job]:
    """Jobs of two that start side by side; what befalls each is up to its test."""
    found = {name: start(2) for name in ("killed 0", "killed 1", "frozen 0", "frozen 1")}
    return found | {"failed": start(2, fail=1), "absent": start(1, size=2)}


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_is_named_within_seconds(jobs: dict[str, Job], lost: int) -> None:
    """Also where it is the first one, which keeps the store that the others ask."""
    job = jobs[f"killed {lost}"]
    job.wait_until_they_work()
    job.ranks[lost].kill()
    code, said, seconds = job.end_of(1 - lost)
    assert code == 1
    assert f"error: rank {lost} (process {job.ranks[lost].pid} of {os.uname().nodename}) is gone: it was killed" in said
    assert f"Rank {1 - lost} waited for it, in step 7. Start again: the run goes on from its newest checkpoint" in said
    assert seconds < 60 * MINUTES


@pytest.mark.parametrize("lost", [0, 1])
def test_a_frozen_process_is_named_within_the_time_that_was_set(jobs: dict[str, Job], lost: int) -> None:
    """SIGSTOP: it is there, its connections stand, and it says nothing more."""
    job = jobs[f"frozen {lost}"]
    job.wait_until_they_work()
    job.ranks[lost].send_signal(signal.SIGSTOP)
    try:
        code, said, seconds = job.end_of(1 - lost)
    finally:
        job.ranks[lost].kill()
    assert code == 1
    silent = "has given no sign of life for" if lost else "does not answer|has given no sign of life for"
    assert any(words in said for words in silent.split("|"))
    assert f"error: rank {lost} (process {job.ranks[lost].pid}" in said
    assert f"Rank {1 - lost} waited for it, in step 7" in said
    assert seconds < 60 * MINUTES + 20


def test_the_error_of_one_process_is_told_by_all(jobs: dict[str, Job]) -> None:
    """The one that failed says what was wrong, and the other says whose error it is."""
    job = jobs["failed"]
    own, others = job.end_of(1), job.end_of(0)
    assert own[:2] == (9, "error: a number that cannot be\n")
    assert others[0] == 1
    assert f"rank 1 (process {job.ranks[1].pid} of {os.uname().nodename}) failed: a number that cannot be" in others[1]


def test_a_process_that_never_starts_is_named(jobs: dict[str, Job]) -> None:
    """A job of two of which one came."""
    code, said, _ = jobs["absent"].end_of(0)
    assert code == 1
    assert "rank(s) 1 of 2 did not start within parallel.timeout_minutes" in said
