"""RUN/history.jsonl: what befell a run, one JSON object a line; lines are only ever added. Beside it its settings."""

import json
import os
import time
from pathlib import Path
from typing import Any

from megatron_sep.files import written_aside
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.written import HISTORY, SETTINGS


class History:
    """Writes events from the first process of the job. A disk that takes none is said, and training goes on."""

    def __init__(self, run_dir: Path, topology: Topology) -> None:
        self._dir, self._path, self._topology = run_dir, run_dir / HISTORY, topology

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

    def keep_settings(self, text: str) -> None:
        """Write down what the run is started with, as YAML."""
        if not self._topology.first:
            return
        try:
            with written_aside(self._dir / SETTINGS) as aside:
                aside.write_text(text, encoding="utf-8")
        except OSError as error:
            self._topology.say(f"{self._dir / SETTINGS}: could not be written: {error}")


def _ends_whole(file: Any) -> bool:
    """Whether a line can follow: a killed process may have written half of the last one."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
