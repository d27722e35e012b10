"""F3, F10, F16 and F17: runs that are asked to stop, losses that jump, and processes that die, freeze or are slow."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.case import Times, Trial, WrongError, expect
from faults.hooks import Point, around, at
from faults.killing import goes_on_exactly
from faults.processes import start_ranks
from faults.verbs import Verb
from faults.world import EVERY, STEPS, lines, numbers

_STOPPED = 75
_ENGINE = "megatron_sep.train.megatron_engine:MegatronEngine"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def asked_to_stop(trial: Trial) -> Times:
    """A signal or a trigger file between two steps or in a save, once or twice: saved, 75, and the rest is exact."""
    random, run = trial.random, trial.folder / "run"
    kind = trial.number % 6
    place = "megatron_sep.weights.sealed:flush_tree" if kind in (1, 3) else "megatron_sep.train.feed:Feed.take"
    before = around(place, _slowly(3.0 if kind in (2, 3) else 0.2))
    verb = trial.world.start(run, before=before)
    _wait_for_step(verb, run, random.randint(1, 8))
    sent = random.choice(_SIGNALS)
    asked = time.monotonic()
    if kind == 5:
        (run / "stop").touch()
    else:
        verb.send(sent)
    if kind in (2, 3):
        time.sleep(1.2)  # two signals within a second are one: schedulers and launchers both pass it on
        verb.send(random.choice(_SIGNALS))
    ended = verb.wait()
    took = time.monotonic() - asked
    expect(ended.code == _STOPPED, f"exit code {ended.code}, not {_STOPPED}: {ended.text[-300:]}")
    expect("Traceback" not in ended.text, ended.text[-300:])
    if kind not in (2, 3):
        expect("saved and stopped" in ended.text, ended.text[-300:])
        last = lines(run)[-1]["step"]
        if not (run / "checkpoints" / f"step-{int(last):08d}").is_dir():
            raise WrongError(f"says that it saved, and step {last} is not there")
    return Times(took, goes_on_exactly(trial.world, run).recover)


def _slowly(seconds: float) -> Callable[..., Any]:
    def slow(original: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments, **more)

    return slow


def _wait_for_step(verb: Verb, run: Path, step: int) -> None:
    while not any(line["step"] >= step for line in lines(run)):
        expect(verb.running(), f"has ended before step {step}: {verb.text()[-300:]}")
        time.sleep(0.01)


_PEER_POINTS = (
    Point("megatron_sep.train.run:build_run"),
    Point("megatron_sep.train.feed:Feed.take"),
    Point("torch.distributed:all_reduce"),
    Point(f"{_ENGINE}.begin_save"),
    Point(f"{_ENGINE}.step", after=True),
    Point("megatron_sep.parallel.groups:set_layout"),
)
_PATIENCE = 12.0
"""Seconds: parallel.timeout_minutes of these runs."""


def lost_peer(trial: Trial) -> Times:
    """SIGKILL or SIGSTOP for one of two processes: the other names it and ends in time; started again, all is exact."""
    random, run = trial.random, trial.folder / "run"
    victim, sent = random.randrange(2), (signal.SIGKILL, signal.SIGSTOP)[trial.number % 2]
    point = _PEER_POINTS[trial.number % len(_PEER_POINTS)]
    struck: Path = trial.folder / "struck"

    def strike() -> None:
        if int(os.environ["RANK"]) == victim:
            struck.write_text(str(time.time()))
            os.kill(os.getpgrp(), sent)

    nth = 1 if "build_run" in point.where or "set_layout" in point.where else random.randint(1, 3)
    settings = (f"parallel.timeout_minutes={_PATIENCE / 60}",)
    ranks = start_ranks(trial.world, run, 2, *settings, before=at(point, nth, strike))
    ended = ranks[1 - victim].wait()
    detected = time.time() - float(struck.read_text())
    ranks[victim].send(signal.SIGKILL)
    ranks[victim].wait()
    expect(ended.code == 1 and "Traceback" not in ended.text, f"{ended.code}: {ended.text[-400:]}")
    expect(f"rank {victim}" in ended.text or f"process {victim}" in ended.text, f"names no rank: {ended.text[-400:]}")
    expect(detected < 2.5 * _PATIENCE, f"after {detected:.0f} s")
    return Times(detected, goes_on_exactly(trial.world, run, straight=trial.world.pair, count=2).recover)


def slow_peer(trial: Trial) -> Times:
    """One of two processes takes its time in every forward pass: it is named."""
    run, slow = trial.folder / "run", trial.random.randrange(2)

    def slowly(original: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        if int(os.environ["RANK"]) == slow:
            time.sleep(0.6)
        return original(*arguments, **more)

    before = around("megatron_sep.train.megatron_engine:_forward", slowly)
    ended = [rank.wait() for rank in start_ranks(trial.world, run, 2, before=before)]
    expect([one.code for one in ended] == [0, 0], [one.text[-300:] for one in ended])
    said = "".join(one.text for one in ended)
    expect(f"rank {slow}" in said and "is slow" in said, f"names no rank: {ended[0].text[-400:]}")
    return Times()


_POLICIES = ("log", "skip", "rollback")


def spike(trial: Trial) -> Times:
    """The loss of one step is ten times what it should be: told with its documents, skipped or undone, as asked for."""
    run, policy, random = trial.folder / "run", _POLICIES[trial.number % len(_POLICIES)], trial.random
    step, count = random.randint(7, 11), [0]

    def scaled(original: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        loss = original(*arguments, **more)
        count[0] += 1
        return loss * 10 if count[0] == step else loss

    settings = (f"train.spike={{policy: {policy}, warmup: 4}}",)
    ended = trial.world.train(run, *settings, before=around(f"{_ENGINE}.forward_backward", scaled))
    expect(ended.code == 0, ended.text[-300:])
    expect(f"step {step}: the loss of" in ended.text and "document" in ended.text, ended.text[-400:])
    expect('"spike"' in (run / "history.jsonl").read_text(), "is not in history.jsonl")
    found = lines(run)
    expect([line["step"] for line in found] == list(range(1, STEPS + 1)), [line["step"] for line in found])
    expect(found[-1]["train/skipped"] == (policy == "skip"), found[-1])
    same = [one == other for one, other in zip(numbers(run), numbers(trial.world.straight), strict=True)]
    kept = step - 1 if policy != "rollback" else (step - 1) // EVERY * EVERY
    if not all(same[:kept]) or (policy == "log" and not all(same[step:])):
        raise WrongError(f"steps that the spike at {step} does not reach are not as they were: {same}")
    return Times()
