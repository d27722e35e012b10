"""`runs`: one line a run below a folder: state, step, losses, time left, and the settings that differ; no torch."""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sep.config.load import read_tree
from megatron_sep.config.section import leaves
from megatron_sep.errors import UserError
from megatron_sep.files import read_json
from megatron_sep.train.figures import duration
from megatron_sep.train.written import HISTORY, METRICS, SETTINGS, read_history, read_jsonl
from megatron_sep.weights.sealed import CheckpointError, describe, finished_checkpoints

_DEPTH = 4
"""Folders below the first that are looked through."""
_NO_RUNS = ("checkpoints", "tensorboard", "wandb")
"""Folders of a run itself."""
_SILENT_SECONDS = 1800.0
"""After so long without a line, a run of another machine is not called running any more."""
_ENDS = {"done": "done", "stopped": "stopped", "interrupted": "interrupted", "failed": "failed"}
_SHOWN_SETTINGS = 8
_PLACES = ("dir", "data.cache")
"""Settings that say where, and not what."""


class RunsError(UserError):
    """A folder that has no runs in it."""


@dataclass(frozen=True)
class RunState:
    """One run as its files tell it."""

    name: str
    state: str
    """running, done, stopped, interrupted, failed, or killed: it ended without a word."""
    step: int
    steps: int | None
    """None: not known."""
    loss: float | None
    """Of the last line with one."""
    valid_loss: float | None
    seconds_left: float | None
    """Of a run that is running."""
    settings: Mapping[str, Any]
    """By their whole keys."""
    why: str = ""
    """The message that it stopped or failed with."""


def list_runs(folder: Path) -> list[RunState]:
    """All runs in a folder and below it, by name. Raises RunsError."""
    if not folder.is_dir():
        raise RunsError(f"{folder}: no such directory; name one that has runs in it, as dir in their YAML")
    found = [
        state_of(name, run, read_history(run), read_jsonl(run / METRICS), settings_of(run))
        for name, run in find_runs([folder]).items()
    ]
    if not found:
        raise RunsError(f"{folder}: has no run in it or below it; runs write {HISTORY} where dir in their YAML says")
    return found


def find_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """The dirs of all runs in some folders and below them, by a name that tells them apart."""
    found: dict[str, Path] = {}
    for folder in folders:
        for run in sorted(_run_dirs(folder, _DEPTH)):
            name = run.name if run == folder else str(run.relative_to(folder))
            found[name if found.get(name, run) == run else str(run)] = run
    return found


def _run_dirs(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / HISTORY).is_file() or (folder / METRICS).is_file():
        yield folder  # a grid has its jobs below a folder that may be a run too
    with suppress(OSError):  # somebody else's folder
        for below in folder.iterdir() if depth else ():
            if below.is_dir() and not below.is_symlink() and below.name not in _NO_RUNS:
                yield from _run_dirs(below, depth - 1)


def state_of(
    name: str,
    run: Path,
    history: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, float]],
    settings: Mapping[str, Any],
) -> RunState:
    """What the lines of a run's files say of it."""
    steps = settings.get("train.steps")
    last = metrics[-1] if metrics else {}
    ends = [line for line in history if line["event"] in (*_ENDS, "start", "resume")]
    state = _state(run, ends[-1]["event"] if ends else "", max(_time(last), _time(ends[-1] if ends else {})))
    step = max(_count(line.get("step")) for line in (last, *ends[-1:]))
    left = _newest(metrics, "speed/seconds_left")
    return RunState(
        name=name,
        state=state,
        step=step,
        steps=steps if isinstance(steps, int) else None,
        loss=(_newest(metrics, "train/loss") or {}).get("train/loss"),
        valid_loss=(_newest(metrics, "valid/loss") or {}).get("valid/loss"),
        seconds_left=_left(left) if state == "running" and left else None,
        settings=settings,
        why=str(ends[-1].get("message", "")) if state in ("failed", "stopped") else "",
    )


def _newest(metrics: Sequence[Mapping[str, float]], name: str) -> Mapping[str, float] | None:
    return next((line for line in reversed(metrics) if name in line), None)


def _count(value: Any) -> int:
    """0 for what counts nothing: anybody can write into a file."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**63 else 0


def _time(line: Mapping[str, Any]) -> float:
    found = line.get("time", 0.0)
    return float(found) if isinstance(found, int | float) else 0.0


def _left(line: Mapping[str, float]) -> float:
    """What the line said, less what has passed since."""
    return max(0.0, line["speed/seconds_left"] - (time.time() - _time(line)))


def _state(run: Path, last_event: str, last_time: float) -> str:
    """By the lock, which a run empties when it ends, and by the last event that begins or ends one."""
    owner = _owner(run / "lock")
    if owner is not None and _lives(owner, last_time):
        return "running"
    return _ENDS.get(last_event, "killed")


def _owner(lock: Path) -> Mapping[str, Any] | None:
    """Whoever stands in the lock; it is not tried, which would keep a run from starting."""
    with suppress(OSError, ValueError):
        found = read_json(lock)
        if isinstance(found, dict):
            return found
    return None


def _lives(owner: Mapping[str, Any], last_time: float) -> bool:
    if owner.get("host") != platform.node():
        return time.time() - last_time < _SILENT_SECONDS
    try:
        os.kill(max(int(owner["process"]), 1), 0)  # 0 and below would be many processes
    except PermissionError:  # another user's
        return True
    except (KeyError, TypeError, ValueError, OverflowError, ProcessLookupError):
        return False
    return True


def settings_of(run: Path) -> dict[str, Any]:
    """Those of RUN/config.yaml, or of the newest checkpoint of a run that is older than that file."""
    with suppress(UserError):
        return dict(leaves(read_tree(run / SETTINGS)))
    for checkpoint in reversed(finished_checkpoints(run / "checkpoints")):
        with suppress(CheckpointError, OSError):
            return dict(leaves(describe(checkpoint).config.model_dump(mode="json")))
    return {}


def differing(runs: Sequence[RunState]) -> list[str]:
    """Settings that are not the same in all runs whose settings are known."""
    known = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for settings in known for key in settings)
    return [key for key in keys if key not in _PLACES and any(s.get(key) != known[0].get(key) for s in known)]


def table(runs: Sequence[RunState]) -> list[str]:
    """A line a run below a line of names, in columns; why one failed or stopped stands below it."""
    keys = differing(runs)
    rows = [("run", "state", "step", "loss", "valid", "eta", "settings"), *(_row(run, keys) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row, run in zip(rows, (None, *runs), strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        lines.append("  ".join([*cells, row[-1]]).rstrip())
        if run is not None and run.why:
            lines.append(f"    {run.why}")
    return lines


def _row(run: RunState, keys: Sequence[str]) -> tuple[str, ...]:
    said = [f"{key}={_in_words(run.settings.get(key))}" for key in keys[:_SHOWN_SETTINGS]] if run.settings else []
    more = [f"and {len(keys) - _SHOWN_SETTINGS} more"] if len(keys) > _SHOWN_SETTINGS and said else []
    return (
        run.name,
        run.state,
        f"{run.step}/{'?' if run.steps is None else run.steps}",
        _number(run.loss),
        _number(run.valid_loss),
        "" if run.seconds_left is None else duration(run.seconds_left),
        " ".join([*said, *more]),
    )


def _in_words(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | bool) or value is None else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
