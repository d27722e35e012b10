"""A heart-beat beside the collectives: a process of the job that died or froze ends the job, and is named.

Each process beats into the job's store. The first one looks at every beat, the others at the first one's; each looks
after the processes of its own machine, whose end it sees at once. What the first to notice finds out it leaves in the
store for all. The store is asked by a thread of its own, for it may be with the process that is frozen.
"""

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from megatron_sep.errors import EndedError, RunFailure, SepError

_TICK = 0.5
"""Seconds between two looks at the processes of this machine."""
_BEAT = 2.0
"""Seconds between two beats, at most."""
_GRACE = 5.0
"""Seconds in which a process ends by itself, with the others' error, before it is ended."""
_PATIENCE = 30.0
"""Seconds that the process which keeps the store waits for the others to end."""
_WAIT = 30.0
"""Seconds after which it is said that a process has not started yet."""
_SHARE = 0.8
"""Of the collectives' time-out, after which a process without a beat is lost: it is named before they give up."""
_VERDICT = "watch/verdict"


class PeerError(RunFailure):
    """A process of the job died, froze or failed, so that the others cannot go on."""


@dataclass(frozen=True)
class Process:
    """Who a rank is."""

    rank: int
    host: str
    number: int
    machine: str
    """The same for processes that see each other's numbers."""

    @classmethod
    def this(cls, rank: int) -> "Process":
        """This process."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        names = Path("/proc/self/ns/pid")
        machine = f"{boot.read_text().strip()} {names.stat().st_ino}" if boot.exists() else str(os.getppid())
        return cls(rank, os.uname().nodename, os.getpid(), machine)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.number} of {self.host})"

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended; for processes of this machine alone."""
        try:
            state = Path(f"/proc/{self.number}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return True
        return state in "ZX"  # ended, and its parent has not asked for it yet


class Watch:
    """Of one process over the others of its job. With one process there is nothing to watch."""

    def __init__(self, rank: int = 0, ranks: int = 1, timeout: timedelta = timedelta(0)) -> None:
        self.rank, self.ranks = rank, ranks
        self.last_words: list[Callable[[str], None]] = []
        """Called with what happened before the process is ended."""
        self._timeout = timeout.total_seconds()
        self._seconds = _SHARE * self._timeout
        self._every = min(_BEAT, max(_TICK, self._seconds / 20))
        self._place, self._verdict = "starting", ""
        self._over = threading.Event()
        self._peers: dict[int, Process] = {}
        self._beats: dict[int, bytes] = {}
        self._silent: dict[int, float] = {}
        self._watched = [other for other in range(ranks) if other != rank and 0 in (other, rank)]
        self._store: Store | None = None
        self._unheard = 0.0
        """Seconds that the store has not answered for."""

    def join(self, store: Store) -> None:
        """Meet the other processes in the store, and begin to watch. Raises PeerError, naming who has not come."""
        self._store, own = store, json.dumps(asdict(self._own()))
        there = store.compare_set(_process(self.rank), "", own).decode()
        if there != own:
            raise PeerError(
                f"{self._own()}: {Process(**json.loads(there))} is in this job already; two jobs meet at one "
                "MASTER_ADDR and MASTER_PORT: set another MASTER_PORT for one of them"
            )
        names = [_process(rank) for rank in range(self.ranks)]
        self._begin(self._beat)
        self._wait_for_all(store, names)
        found = [Process(**json.loads(value)) for value in store.multi_get(names)]
        self._peers = {peer.rank: peer for peer in found if peer.rank != self.rank}
        self._silent = dict.fromkeys(self._watched, 0.0)
        atexit.register(lambda: self.leave(getattr(sys, "last_value", None)))
        self._begin(self._look)

    def _wait_for_all(self, store: Store, names: list[str]) -> None:
        begin = time.monotonic()
        while absent := [str(rank) for rank, name in enumerate(names) if not store.check([name])]:
            who = f"rank(s) {', '.join(absent)} of {self.ranks}"
            left = self._timeout - (time.monotonic() - begin)
            if left <= 0:
                raise PeerError(
                    f"{who} did not start within parallel.timeout_minutes; look at what they said, or raise it"
                )
            with suppress(dist.DistStoreError):
                store.wait(names, timedelta(seconds=min(_WAIT, left)))
                return
            if self.rank == 0 and left > _WAIT:
                print(f"waiting for {who} to start", flush=True)

    def at(self, place: str) -> None:
        """What this process does from now on, which may be to wait for the others."""
        self._place = place

    def who(self, rank: int) -> str:
        """A rank with its process and machine, as far as they are known."""
        return str(self._own() if rank == self.rank else self._peers.get(rank, f"rank {rank}"))

    def named(self, error: BaseException) -> PeerError | None:
        """The error as one that names the process that is lost; None where it has nothing to do with the others."""
        if self._store is None or isinstance(error, SepError) or not _is_of_a_peer(error):
            return None
        begin = time.monotonic()
        while not self._verdict and time.monotonic() - begin < max(_GRACE, 3 * self._every):
            time.sleep(_TICK / 5)
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        lost = self._verdict or f"a process of this job does not answer: {first_line}"
        return PeerError(self._message(lost))

    def leave(self, error: BaseException | None) -> None:
        """This process ends, well or with an error, which the others hear of; who keeps the store ends last."""
        if self._over.is_set():
            return
        if self._store is not None and self._answers:
            with suppress(RuntimeError):
                self._store.set(_left(self.rank), "yes")
                if error is not None and not isinstance(error, PeerError | EndedError):
                    said = (str(error).strip() or repr(error)).splitlines()[0]
                    self._store.compare_set(_VERDICT, "", f"{self._own()} failed: {said}")
                patience = timedelta(seconds=_PATIENCE if error is None else 2 * self._every + 1)
                if self.rank == 0:
                    self._store.wait([_left(rank) for rank in range(self.ranks)], patience)
        self._over.set()

    @property
    def _answers(self) -> bool:
        """Whether the store can be asked without waiting for ever."""
        return self._unheard < 3 * self._every + _TICK

    def _own(self) -> Process:
        return Process.this(self.rank)

    def _message(self, lost: str) -> str:
        return (
            f"{lost}. Rank {self.rank} waited for it, {self._place}. Start again: the run goes on from its newest "
            "checkpoint"
        )

    def _begin(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name="watch", daemon=True).start()

    def _beat(self) -> None:
        """Tell the store that this process lives, and hear of the others; whatever fails shows in ``_unheard``."""
        assert self._store is not None
        store = self._store.clone()  # type: ignore[attr-defined]
        number = 0
        while not self._over.wait(self._every):
            number += 1
            with suppress(RuntimeError):
                store.set(_beat(self.rank), f"{number} {self._place}")
                self._hear(store)
                self._unheard = 0.0

    def _hear(self, store: Store) -> None:
        if store.check([_VERDICT]):
            self._judge(store.get(_VERDICT).decode())
        there = [rank for rank in self._watched if rank in self._beats or store.check([_beat(rank)])]
        beats = dict(zip(there, store.multi_get([_beat(rank) for rank in there]), strict=True)) if there else {}
        for rank in self._watched:
            if beats.get(rank) != self._beats.get(rank):
                self._silent[rank] = 0.0
        self._beats.update(beats)

    def _look(self) -> None:
        """Once a tick: is everybody there? Time in which this process itself was stopped does not count."""
        while not self._over.wait(_TICK) and not self._verdict:
            self._unheard += _TICK
            for rank in self._silent:
                self._silent[rank] += _TICK
            lost = self._lost()
            if lost:
                self._judge(lost)
        if self._over.wait(_GRACE) or not self._verdict:
            return
        for say in self.last_words:
            with suppress(Exception):
                say(self._message(self._verdict))
        with suppress(OSError):
            sys.stderr.write(f"error: {self._message(self._verdict)}\n")
            sys.stderr.flush()
        os._exit(PeerError.exit_code)

    def _lost(self) -> str:
        """Who is lost, in words; empty where everybody is there."""
        machine = self._own().machine
        for peer in self._peers.values():
            if peer.machine == machine and peer.is_gone and not self._has_left(peer.rank):
                return f"{peer} is gone: it was killed, or ended without a word"
        for rank, seconds in self._silent.items():
            if seconds >= self._seconds and not self._has_left(rank):
                place = self._beats.get(rank, b" starting").decode().partition(" ")[2]
                return f"{self._peers[rank]} has given no sign of life for {seconds:.0f} s, {place}"
        if self._unheard >= self._seconds:
            return f"{self._peers.get(0, 'rank 0')} or the launcher, which keeps the job's store, does not answer"
        return ""

    def _has_left(self, rank: int) -> bool:
        """Whether a process said that it ends; asked of the store only while that answers."""
        if self._store is None or not self._answers:
            return False
        try:
            return bool(self._store.check([_left(rank)]))
        except RuntimeError:
            return False

    def _judge(self, lost: str) -> None:
        """Take over a verdict, and leave it for the others."""
        self._verdict = self._verdict or lost
        if self._store is not None and self._answers:
            with suppress(RuntimeError):
                self._store.compare_set(_VERDICT, "", lost)


def _process(rank: int) -> str:
    return f"watch/process/{rank}"


def _beat(rank: int) -> str:
    return f"watch/beat/{rank}"


def _left(rank: int) -> str:
    return f"watch/left/{rank}"


def _is_of_a_peer(error: BaseException) -> bool:
    """Does an error of torch say that another process did not do its part?"""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection closed"))
