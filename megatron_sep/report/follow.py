"""A run's metrics.jsonl read as it grows, each line with the tokens, seconds and operations until there; no torch."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sep.report.figures import AXES, METRICS
from megatron_sep.train.written import METRICS as FILE
from megatron_sep.train.written import metrics_lines

_SEAM = 256
"""Bytes before the place that was read to; where they changed, the file is another one."""


class Follower:
    """What a run has logged. A file that was written anew, as by a resumed run, is read from its beginning again."""

    def __init__(self, run: Path) -> None:
        self.run, self.lock = run, threading.Lock()
        self.generation = 0
        """How often the file was begun anew."""
        self._forget()

    def _forget(self) -> None:
        self.lines: list[dict[str, float]] = []
        self.rows: list[dict[str, float | None]] = []
        self._read, self._seam, self._at = 0, b"", {"seconds": 0.0, "flops": 0.0}

    def look(self, settings: Mapping[str, Any]) -> None:
        """Read the whole lines that are new; a last one without its end waits until it has one."""
        path = self.run / FILE
        if not path.is_file():
            new = b""
        else:
            with path.open("rb") as file:
                file.seek(self._read - len(self._seam))
                if file.read(len(self._seam)) != self._seam:
                    self._forget()
                    self.generation += 1
                    file.seek(0)
                new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        self._seam = (self._seam + whole)[-_SEAM:]
        for line in metrics_lines(whole.decode(errors="replace")):
            self._add(line, settings)

    def _add(self, line: dict[str, float], settings: Mapping[str, Any]) -> None:
        """Seconds and operations are those of the steps alone: a pause between two parts of a run adds nothing."""
        before = self.lines[-1]["step"] if self.lines else settings.get("checkpoint.init_step") or 0
        seconds = max(0.0, line["step"] - before) * line.get("speed/step_seconds", 0.0)
        self._at["seconds"] += seconds
        self._at["flops"] += seconds * line.get("speed/model_flops", 0.0)
        length = settings.get("model.sequence_length")
        if "train/consumed" in line and isinstance(length, int):
            self._at["tokens"] = line["train/consumed"] * length
        self.lines.append(line)
        values = {"step": line["step"], **self._at, **{name: line[name] for name in METRICS if name in line}}
        self.rows.append({name: values.get(name) for name in (*AXES, *METRICS)})
