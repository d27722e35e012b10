"""A job whose port somebody else has ends with a message, and never meets another job there."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta

import pytest
from support.ports import free_port

from megatron_sep.parallel.store import store_of
from megatron_sep.parallel.watch import PeerError, Watch

TIMEOUT = timedelta(seconds=20)
RANK_1 = """
import os, sys
from datetime import timedelta
from megatron_sep.errors import SepError
from megatron_sep.parallel.store import store_of
from megatron_sep.parallel.watch import Watch
timeout = timedelta(seconds=2)
try:
    Watch(1, 2, timeout).join(store_of(os.environ, 1, 2, timeout, "runs/a"))
except SepError as error:
    print(error, flush=True)
os._exit(0)
"""


def at(port: int) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def said_by_rank_1(port: int) -> str:
    """What the second process of a job on runs/a says, which waits for 2 seconds."""
    environment = os.environ | at(port) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", RANK_1]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=90, env=environment).stdout


@pytest.fixture
def silent() -> Iterator[dict[str, str]]:
    """A port where something listens that says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield at(listening.getsockname()[1])


def test_what_listens_and_says_nothing_is_no_store(silent: Mapping[str, str]) -> None:
    """As a connection of another job does: torch itself would wait for its first word for ever."""
    said = said_by_rank_1(int(silent["MASTER_PORT"]))
    assert f"rank 1 of 2: no answer from 127.0.0.1:{silent['MASTER_PORT']}, where rank 0 keeps the job's store" in said


def test_a_port_that_is_taken_is_told_with_the_way_out(silent: Mapping[str, str]) -> None:
    """By the process that would listen there."""
    with pytest.raises(
        PeerError, match=r"rank 0 of 2 cannot keep the job's store at .* set a MASTER_PORT that is free"
    ):
        store_of(silent, 0, 2, TIMEOUT)


def test_a_process_of_another_job_is_refused() -> None:
    """Two jobs at one port, the first process of the second gone: its others do not join the first job."""
    port = free_port()
    store = store_of(at(port), 0, 2, TIMEOUT, "runs/b")
    assert "rank 1 of 2 processes on runs/a" in (said := said_by_rank_1(port))
    assert "meets another job, 2 processes on runs/b; set another MASTER_PORT" in said
    del store


def test_a_rank_is_one_process() -> None:
    """A second one that says it is the same rank is refused, and the first one named."""
    port = free_port()
    store = store_of(at(port), 0, 2, TIMEOUT, "runs/a")
    store.set("watch/process/1", '{"rank": 1, "host": "there", "number": 7, "machine": "m"}')
    assert "rank 1 (process 7 of there) is in this job already; two jobs meet" in said_by_rank_1(port)


def test_a_process_may_join_again() -> None:
    """What it left in the store is its own."""
    store = store_of(at(free_port()), 0, 1, TIMEOUT)
    for _ in range(2):
        watch = Watch(0, 1, TIMEOUT)
        watch.join(store)
        watch.leave(None)
