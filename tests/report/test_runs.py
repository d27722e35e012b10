"""`runs` tells the state of every run from its files alone."""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sep.config import RunConfig, to_yaml
from megatron_sep.parallel.groups import topology
from megatron_sep.report.runs import RunsError, RunState, list_runs, table
from megatron_sep.train.run_lock import run_lock


def made(folder: Path, *events: str, config: RunConfig | None = None, lines: int = 2, **last: Any) -> Path:
    """A run's folder with a history that ends so, and lines of metrics."""
    folder.mkdir(parents=True)
    history = [{"time": time.time(), "event": event, "step": lines, "message": f"{event} why"} for event in events]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    numbers = [
        {"step": n, "time": time.time(), "train/loss": 4.0 / n, "speed/seconds_left": 90.0} for n in range(1, lines + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | last) + "\n" for line in numbers))
    if config is not None:
        (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def one(folder: Path) -> RunState:
    (found,) = list_runs(folder)
    return found


@pytest.mark.parametrize(
    ("events", "state"),
    [
        (("start", "done"), "done"),
        (("start", "stopped"), "stopped"),
        (("start", "interrupted", "resume", "failed"), "failed"),
        (("start", "interrupted"), "interrupted"),
        (("start", "stopped", "resume", "spike"), "killed"),
    ],
)
def test_a_run_that_ended_is_what_its_history_says(tmp_path: Path, events: tuple[str, ...], state: str) -> None:
    """The last event that begins or ends it counts; one that ended without a word was killed."""
    found = one(made(tmp_path / "run", *events))
    assert (found.state, found.step, found.loss, found.seconds_left) == (state, 2, 2.0, None)
    assert found.why == (f"{state} why" if state in ("stopped", "failed") else "")


@pytest.mark.usefixtures("single_process")
def test_a_run_that_holds_its_lock_is_running(tmp_path: Path) -> None:
    """With what its last line gave it, less the time since; afterwards it is not, and the lock was not touched."""
    run = made(tmp_path / "run", "start")
    with run_lock(run, topology()):
        found = one(run)
        assert found.state == "running"
        assert found.seconds_left == pytest.approx(90, abs=5)
    assert one(run).state == "killed"


@pytest.mark.parametrize(("host", "age", "state"), [("elsewhere", 0, "running"), ("elsewhere", 7200, "killed")])
def test_a_run_of_another_machine_is_judged_by_its_last_line(tmp_path: Path, host: str, age: int, state: str) -> None:
    """Its process cannot be looked for."""
    run = made(tmp_path / "run", time=time.time() - age)
    (run / "lock").write_text(json.dumps({"host": host, "process": os.getpid()}))
    assert one(run).state == state


def test_a_lock_whose_process_is_gone_holds_nothing(tmp_path: Path) -> None:
    """A killed run of this machine; a lock that is no JSON neither."""
    run = made(tmp_path / "run", "start")
    for lock in (json.dumps({"host": platform.node(), "process": 2**22 + 1}), "{", "[]"):
        (run / "lock").write_text(lock)
        assert one(run).state == "killed"


def test_settings_that_differ_are_shown(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Of runs at any depth, those of a folder that is a run itself too; nothing that all have, and no dir."""
    made(tmp_path / "all" / "grid", "start", "done", config=tiny())
    made(tmp_path / "all" / "grid" / "window-4", "start", "done", config=tiny(attention={"window": 4}, dir="elsewhere"))
    made(tmp_path / "all" / "old", "start", "failed")
    (tmp_path / "all" / "grid" / "checkpoints" / "x").mkdir(parents=True)
    (tmp_path / "all" / "grid" / "checkpoints" / "x" / "history.jsonl").write_text("")
    head, *lines = table(list_runs(tmp_path / "all"))
    assert head.split() == ["run", "state", "step", "loss", "valid", "eta", "settings"]
    assert [line.split() for line in lines] == [
        ["grid", "done", "2/8", "2.0000", "attention.window=8"],
        ["grid/window-4", "done", "2/8", "2.0000", "attention.window=4"],
        ["old", "failed", "2/?", "2.0000"],
        ["failed", "why"],
    ]


@pytest.mark.usefixtures("single_process")
def test_a_trained_run_has_written_its_settings(tiny: Callable[..., RunConfig]) -> None:
    """Its configuration, resolved, with which it goes on; one that is older tells those of its checkpoint."""
    from megatron_sep.config import load_config
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    config = tiny(train={"steps": 2, "eval_every": 0})
    train(build_run(config, topology()))
    kept = load_config(config.dir / "config.yaml")
    assert kept.optimizer.decay_steps == 2
    assert kept.model_copy(update={"optimizer": config.optimizer}) == config
    found = one(config.dir)
    assert (found.state, found.step, found.steps) == ("done", 2, 2)
    (config.dir / "config.yaml").unlink()
    assert one(config.dir).settings == found.settings


@pytest.mark.parametrize("name", ["history.jsonl", "metrics.jsonl", "lock", "config.yaml"])
@pytest.mark.parametrize(
    "content",
    [
        b"\xff\x00",
        b"[" * 100_000,
        b'{"event": "done", "step": "x", "time": "y"}',
        b'{"event": "start", "step": -1e999, "process": 0, "host": 3}',
        b'{"step": 1e999, "time": -1, "train/loss": NaN, "speed/seconds_left": 1}',
        b"null",
    ],
)
def test_a_file_that_is_none_stops_no_list(tmp_path: Path, name: str, content: bytes) -> None:
    """Whatever stands in it, the run is listed."""
    run = made(tmp_path / "run", "start")
    (run / name).write_bytes(content)
    assert len(table(list_runs(run))) == 2


def test_where_no_run_is_that_is_said(tmp_path: Path) -> None:
    """A folder that is not there, and one with nothing in it."""
    with pytest.raises(RunsError, match="no such directory"):
        list_runs(tmp_path / "gone")
    with pytest.raises(RunsError, match=r"has no run in it or below it"):
        list_runs(tmp_path)
