"""One training at a time in a run's dir."""

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sep.errors import UserError
from megatron_sep.parallel.topology import Topology


class DirInUseError(UserError):
    """The dir of a run that cannot be written to, or that another training writes to."""


@contextmanager
def run_lock(run_dir: Path, topology: Topology) -> Iterator[None]:
    """Hold RUN/lock in the first process of the job, from before anything is written there until the end.

    The system lets go of it when the process ends, however it ends; what a killed one left is taken over and said.
    Raises DirInUseError on every process.
    """
    held: list[Any] = []
    topology.tell(lambda: held.append(_take(run_dir)))
    try:
        yield
    finally:
        for lock in held:
            lock.truncate(0)
            lock.close()


def _take(run_dir: Path) -> Any:
    path = run_dir / "lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise DirInUseError(f"dir={run_dir}: cannot be written to ({error}); set another dir") from error
    lock.seek(0)
    owner = _owner(lock.read())
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise DirInUseError(
            f"dir={run_dir}: {owner} trains there already; wait for it, end it, or set another dir"
        ) from error
    except OSError as error:
        lock.close()
        raise DirInUseError(f"dir={run_dir}: cannot be locked ({error}); set a dir on another disk") from error
    if owner != _NOBODY:
        print(f"dir={run_dir}: {owner} ended without letting go of it; taken over", flush=True)
    lock.truncate(0)
    lock.write(json.dumps({"host": platform.node(), "process": os.getpid()}))
    lock.flush()
    return lock


_NOBODY = "nobody"


def _owner(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['process']} of {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process" if text.strip() else _NOBODY
