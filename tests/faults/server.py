"""Runs trials in forked processes, a few at a time, each under a limit of time, and gathers what they found."""

import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from faults.case import Fault, Times, Trial, WrongError
from faults.world import World

LIMIT = 420.0
"""Seconds that a trial may take; one that takes longer has not been survived."""


@dataclass(frozen=True)
class Result:
    """What one trial found."""

    fault: str
    number: int
    survived: bool
    wrong: bool
    detect: float | None
    recover: float | None
    seconds: float
    processor: float
    """Seconds of processors that it and all that it started took."""
    note: str = ""
    """Why it was not survived."""


@dataclass
class _Running:
    fault: Fault
    number: int
    folder: Path
    pid: int
    began: float


def run_trials(plan: Sequence[tuple[Fault, int]], world: World, folder: Path, workers: int) -> Iterator[Result]:
    """Every (fault, number), in about that order; the folder of a trial that was not survived stays."""
    waiting, running = list(plan), list[_Running]()
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(_start(*waiting.pop(0), world, folder))
        for one in list(running):
            if _ended(one):
                running.remove(one)
                yield _result(one)
        time.sleep(0.005)


def _start(fault: Fault, number: int, world: World, folder: Path) -> _Running:
    own = folder / f"{fault.name}-{number}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        _become(fault, Trial(fault.name, number, own / "work", world), own)
    return _Running(fault, number, own, pid, time.monotonic())


def _become(fault: Fault, trial: Trial, folder: Path) -> None:
    """Run one trial in this forked process and write what it found; does not return."""
    survived, wrong, times, note = False, False, Times(), ""
    began = time.monotonic()
    try:
        os.setsid()
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        trial.folder.mkdir()
        times, survived = fault.run(trial), True
    except WrongError as error:
        wrong, note = True, str(error)
    except BaseException as error:
        note = f"{type(error).__name__}: {error}"
        (folder / "traceback").write_text(traceback.format_exc())
    took = time.monotonic() - began
    result = Result(
        fault.name, trial.number, survived, wrong, times.detect, times.recover, took, processor_seconds(), note[:400]
    )
    (folder / "result.json").write_text(json.dumps(asdict(result)))
    os._exit(0)


def processor_seconds() -> float:
    """Of this process and all those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _ended(one: _Running) -> bool:
    if os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
        os.waitpid(one.pid, 0)
    elif time.monotonic() - one.began > LIMIT:
        os.killpg(one.pid, signal.SIGKILL)
        os.waitpid(one.pid, 0)
    else:
        return False
    with suppress(ProcessLookupError):
        os.killpg(one.pid, signal.SIGKILL)
    return True


def _result(one: _Running) -> Result:
    try:
        result = Result(**json.loads((one.folder / "result.json").read_text()))
    except (OSError, ValueError):
        took = time.monotonic() - one.began
        return Result(one.fault.name, one.number, False, False, None, None, took, 0.0, f"no result after {took:.0f} s")
    if result.survived:
        shutil.rmtree(one.folder, ignore_errors=True)
    return result
