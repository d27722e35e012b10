"""What injects faults can tell a survived one from one that was not, and from one that went wrong."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import hooks, server
from faults.case import Fault, Times, Trial, WrongError, expect
from faults.killing import equals_straight, told
from faults.verbs import Ended, call
from faults.world import World


def survived(trial: Trial) -> Times:
    expect(trial.folder.is_dir(), "has no folder")
    return Times(detect=trial.number / 2)


def wrong(_: Trial) -> Times:
    raise WrongError("taken for good")


def dies(_: Trial) -> Times:
    os.kill(os.getpid(), signal.SIGKILL)
    return Times()


def hangs(_: Trial) -> Times:
    signal.pause()
    return Times()


def fault(run: object) -> Fault:
    return Fault("F1", "", "", "", 1, 2, run)  # type: ignore[arg-type]


def test_a_trial_is_survived_wrong_or_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What returns, what raises WrongError, what dies, and what hangs past the limit, two at a time."""
    monkeypatch.setattr(server, "LIMIT", 1.0)
    plan = [(fault(run), number) for number, run in enumerate((survived, wrong, dies, hangs))]
    results = {result.number: result for result in server.run_trials(plan, World(tmp_path), tmp_path, workers=2)}
    assert {number: (result.survived, result.wrong) for number, result in results.items()} == {
        0: (True, False),
        1: (False, True),
        2: (False, False),
        3: (False, False),
    }
    assert results[0].detect == 0.0
    assert results[1].note == "taken for good"
    assert "no result after" in results[3].note


def test_a_trial_follows_from_its_number(tmp_path: Path) -> None:
    """The same random choices each time, others under another number or for another fault."""
    draws = [Trial(name, number, tmp_path, World(tmp_path)).random.random() for name, number in [("F1", 1)] * 2]
    assert draws[0] == draws[1]
    assert Trial("F1", 2, tmp_path, World(tmp_path)).random.random() != draws[0]
    assert Trial("F2", 1, tmp_path, World(tmp_path)).random.random() != draws[0]


STRUCK = """
import os, sys
from faults.hooks import Point, at, kill
os.setsid()
at(Point("os:getcwd", after=sys.argv[2] == "after"), int(sys.argv[1]), kill())()
for number in range(1, 6):
    print(number, flush=True)
    os.getcwd()
    print("called", flush=True)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_strikes_at_the_call_that_it_is_told(when: str) -> None:
    """The third call is the last that is begun; the process is gone by SIGKILL."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", STRUCK, "3", when]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["1", "called", "2", "called", "3"]


@pytest.fixture
def module() -> Iterator[None]:
    """Puts back what a hook has replaced."""
    before = os.getppid
    yield
    os.getppid = before


@pytest.mark.usefixtures("module")
def test_what_stands_around_a_call_changes_it() -> None:
    """Its result is what the change makes of it."""
    parent = os.getppid()
    hooks.around("os:getppid", lambda original: -original())()
    assert os.getppid() == -parent


def test_a_verb_is_the_command_line(tmp_path: Path) -> None:
    """Its exit code, its message and its help, from a forked process."""
    refused = call(tmp_path / "one", "train", tmp_path / "none.yaml")
    assert refused.code == 2
    assert "none.yaml: cannot be read" in refused.message
    assert told(refused, 2, "cannot be read") == refused.seconds
    shown = call(tmp_path / "two", "--help")
    assert shown.code == 0
    assert "train" in shown.text


@pytest.mark.parametrize(
    "ended",
    [Ended(0, "error: no room", 1.0), Ended(2, "error: no space", 1.0), Ended(2, "Traceback\nerror: no room", 1.0)],
)
def test_another_end_than_the_one_that_is_expected_is_not_survived(ended: Ended) -> None:
    """Another exit code, another message, a traceback."""
    with pytest.raises(AssertionError):
        told(ended, 2, "no room")


def test_one_bit_of_one_loss_is_a_wrong_run(tmp_path: Path) -> None:
    """Numbers and sums of tensors are compared exactly."""
    for name, loss, digest in (("straight", "1.5", "a"), ("same", "1.5", "a"), ("loss", "1.5000000000000002", "a"),
                               ("tensor", "1.5", "b"), ("short", "", "a")):  # fmt: skip
        checkpoint = tmp_path / name / "checkpoints" / "step-00000001"
        checkpoint.mkdir(parents=True)
        rest = ", ".join(f'"train/{key}": 1' for key in ("lr", "grad_norm", "consumed", "skipped", "loss_scale"))
        line = f'{{"step": 1, "train/loss": {loss}, {rest}}}\n' if loss else ""
        (tmp_path / name / "metrics.jsonl").write_text(line)
        (checkpoint / "manifest.json").write_text(f'{{"files": {{"__0_0.distcp": {{"sha256": "{digest}"}}}}}}')
    world = World(tmp_path)
    equals_straight(world, tmp_path / "same")
    for name in ("loss", "tensor", "short"):
        with pytest.raises(WrongError):
            equals_straight(world, tmp_path / name)
