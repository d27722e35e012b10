"""A run that is asked to stop finishes its step, saves, and goes on later as if it had never stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import forked

from megatron_sep.config import RunConfig, to_yaml
from megatron_sep.errors import InterruptedRunError, StoppedError
from megatron_sep.parallel.groups import topology
from megatron_sep.train.signals import Signals, heard_signals
from megatron_sep.train.written import read_history, read_jsonl
from megatron_sep.weights.sealed import fault_of, finished_checkpoints

pytestmark = pytest.mark.usefixtures("single_process")

EXACT = ("step", "train/loss", "train/grad_norm", "train/lr", "train/consumed", "valid/loss")
WAITING = """
import ctypes, sys
from megatron_sep.train.signals import heard_signals
with heard_signals() as signals:
    signals.can_finish = sys.argv[1] == "training"
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).pause()  # as in a library that waits for a peer
"""


def train(config: RunConfig, signals: Signals | None = None, at: tuple[int, Callable[[], None]] | None = None) -> None:
    """Train; ``at``: in a step, something happens."""
    from megatron_sep.train.loop import train as loop
    from megatron_sep.train.run import build_run

    run = build_run(config, topology(), (), signals)
    if at is not None:
        rules = run.train_data.rules

        def happens(step: int) -> object:
            if step == at[0]:
                at[1]()
            return rules(step)

        run.train_data.rules = happens
    loop(run)


def numbers(run_dir: Path) -> list[dict[str, float]]:
    lines = read_jsonl(run_dir / "metrics.jsonl")
    return [{key: line[key] for key in EXACT if key in line} for line in lines if len(line.keys() & set(EXACT)) > 1]


def steps_saved(config: RunConfig) -> list[str]:
    found = finished_checkpoints(config.dir / "checkpoints")
    assert [fault_of(path) for path in found] == [None] * len(found)
    return [path.name for path in found]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_saved_and_it_goes_on_as_if_nothing_had_happened(
    tiny: Callable[..., RunConfig], tmp_path: Path, number: signal.Signals
) -> None:
    """Received in step 3 of 8: that step is finished and saved; the rest gives the numbers of a run of 8 steps."""
    straight, cut = (tiny(dir=str(tmp_path / name), checkpoint={"every": 5}) for name in ("straight", "cut"))
    train(straight)
    with heard_signals() as signals, pytest.raises(StoppedError, match=rf"step 3 of 8: {number.name}: saved"):
        train(cut, signals, at=(3, lambda: os.kill(os.getpid(), number)))
    assert steps_saved(cut) == ["step-00000003"]
    assert StoppedError.exit_code == 75
    train(cut)
    assert numbers(cut.dir) == numbers(straight.dir)
    assert [line["event"] for line in read_history(cut.dir) if line["event"] in ("stopped", "done")] == [
        "stopped",
        "done",
    ]


def test_a_file_asks_for_a_checkpoint_or_for_the_end(tiny: Callable[..., RunConfig]) -> None:
    """RUN/save and RUN/stop are honoured once and go away."""
    config = tiny(checkpoint={"every": 99}, train={"eval_every": 0})
    config.dir.mkdir()
    (config.dir / "save").touch()
    train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})}))
    assert steps_saved(config) == ["step-00000001", "step-00000004"]
    (config.dir / "stop").touch()
    with pytest.raises(StoppedError, match=r"step 5 of 8: .*run/stop: saved and stopped; the same command goes on"):
        train(config)
    assert steps_saved(config) == ["step-00000001", "step-00000004", "step-00000005"]
    assert not {"save", "stop"} & {path.name for path in config.dir.iterdir()}
    train(config)
    assert steps_saved(config)[-1] == "step-00000008"


def test_torchrun_does_not_start_a_stopped_run_again(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--max-restarts takes exit code 75 for a failure; whoever starts the run himself goes on."""
    config = tiny(train={"steps": 3, "eval_every": 0})
    config.dir.mkdir()
    (config.dir / "stop").touch()
    with pytest.raises(StoppedError, match="step 1 of 3"):
        train(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(StoppedError, match="was stopped as it was asked to; torchrun's restart 1 does not change that"):
        train(config)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    train(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(config)
    assert steps_saved(config)[-1] == "step-00000003"


def test_an_interrupt_says_where_it_stopped_and_how_to_go_on(tiny: Callable[..., RunConfig]) -> None:
    """In step 7, with a checkpoint of step 4; before the first checkpoint it says so."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    config = tiny(checkpoint={"every": 4, "background": False})
    with pytest.raises(InterruptedRunError, match=r"after step 1 of 8; the same command goes on from its beginning"):
        train(config, at=(2, interrupt))
    with pytest.raises(InterruptedRunError, match=r"after step 6 of 8; the same command .* from .*step-00000004"):
        train(config, at=(7, interrupt))
    assert InterruptedRunError.exit_code == 130


@pytest.mark.parametrize(("phase", "first"), [("training", None), ("starting", 75)])
def test_a_second_signal_ends_a_process_that_waits_inside_a_library(phase: str, first: int | None) -> None:
    """Two a second apart: the first is noted, or ends a process that has no step to finish; the second ends it, 75."""
    waiting = subprocess.Popen([sys.executable, "-c", WAITING, phase], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == b"ready\n"
    waiting.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    waiting.send_signal(signal.SIGTERM)  # what a scheduler and a launcher send at once counts as one
    time.sleep(1.2)
    assert waiting.poll() == first
    waiting.send_signal(signal.SIGTERM)
    _, said = waiting.communicate(timeout=5)
    assert waiting.returncode == 75
    assert said.decode().startswith("SIGTERM: ended at once; what is saved stays as it is")


def test_the_command_exits_with_75_and_its_last_checkpoint_is_whole(
    tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """SIGTERM to `train`: one line, exit code 75, and what it names is there."""
    config = tiny(train={"steps": 100_000, "eval_every": 0}, checkpoint={"every": 100_000, "keep": 1})
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    said = tmp_path / "said"
    run = forked.start("-m", "megatron_sep", "train", path, out=tmp_path / "out", err=said)
    while not read_jsonl(config.dir / "metrics.jsonl") and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) == 75
    (line,) = [line for line in said.read_text().splitlines() if "saved and stopped" in line]
    (name,) = steps_saved(config)
    assert line.startswith(f"step {int(name.removeprefix('step-'))} of 100000: SIGTERM: saved and stopped")
