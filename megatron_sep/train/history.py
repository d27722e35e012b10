"""RUN/history.jsonl: what befell a run, one JSON object a line; lines are only ever added."""

import json
import os
import time
from pathlib import Path
from typing import Any

from megatron_sep.parallel.topology import Topology

FILE = "history.jsonl"


class History:
    """Writes events from the first process of the job. A disk that takes none is said, and training goes on."""

    def __init__(self, run_dir: Path, topology: Topology) -> None:
        self._path, self._topology = run_dir / FILE, topology

    def add(self, event: str, **values: Any) -> None:
        """One line: the time in seconds since 1970, what happened, and what there is to say of it."""
        if not self._topology.first:
            return
        line = json.dumps({"time": time.time(), "event": event, **values}, ensure_ascii=False, default=str) + "\n"
        try:
            with self._path.open("a+b") as file:
                file.write((b"" if _ends_whole(file) else b"\n") + line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._topology.say(f"{self._path}: {event} could not be written down: {error}")


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's history, in order; one that a kill cut off is left out."""
    path = run_dir / FILE
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "event" in value:
            found.append(value)
    return found


def consumed_before(run_dir: Path, step: int, batch: int) -> int:
    """Sequences that a run had read before a step of ``batch``: rollbacks and other batches have moved them on."""
    goes_on = [line for line in read_history(run_dir) if line["event"] in ("start", "resume", "rollback")]
    at, consumed = next(((line["step"], line["consumed"]) for line in reversed(goes_on) if line["step"] < step), (0, 0))
    return int(consumed) + (step - 1 - int(at)) * batch


def _ends_whole(file: Any) -> bool:
    """Whether a line can follow: a killed process may have written half of the last one."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
