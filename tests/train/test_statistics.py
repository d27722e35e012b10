"""A status line tells the steps it is about: their mean loss and their speed, without what was done between them."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.engines import Files

from megatron_sep.config import RunConfig
from megatron_sep.parallel.groups import topology
from megatron_sep.train.written import read_jsonl

pytestmark = pytest.mark.usefixtures("single_process")

PAUSE = 1.0


def build(config: RunConfig) -> "Run":  # noqa: F821
    from megatron_sep.train.run import build_run

    return build_run(config, topology())


def train(run: "Run") -> list[dict[str, float]]:  # noqa: F821
    from megatron_sep.train.loop import train as loop

    loop(run)
    return read_jsonl(run.config.dir / "metrics.jsonl")


def test_the_loss_of_a_line_is_the_mean_since_the_last_line(tiny: Callable[..., RunConfig], tmp_path: object) -> None:
    """A line every 3 steps has the mean of the 3 losses that a line every step has, and the last one too."""
    each = train(build(tiny(dir=f"{tmp_path}/each", train={"eval_every": 0}, metrics={"every": 1})))
    losses = {line["step"]: line["train/loss"] for line in each if "train/loss" in line}
    thirds = train(build(tiny(dir=f"{tmp_path}/thirds", train={"eval_every": 0}, metrics={"every": 3})))
    lines = [line for line in thirds if "train/loss" in line]
    assert [line["step"] for line in lines] == [3, 6, 8]
    for line, steps in zip(lines, [(1, 2, 3), (4, 5, 6), (7, 8)], strict=True):
        assert line["train/loss"] == pytest.approx(sum(losses[step] for step in steps) / len(steps), rel=1e-6)
        assert line["train/loss_last"] == losses[steps[-1]]


def test_saves_and_validation_are_no_part_of_a_steps_time(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With saves and validations of a second each, no line has a step as long; both are logged as they are."""
    run = build(tiny(train={"steps": 8, "eval_every": 4}, checkpoint={"every": 2}))
    save, evaluate = run.engine.begin_save, run.engine.evaluate

    def slow_save(folder: Path) -> object:
        time.sleep(PAUSE)
        return save(folder)

    def slow_evaluate(*arguments: object) -> torch.Tensor:
        time.sleep(PAUSE / 2)  # of two batches
        return evaluate(*arguments)

    monkeypatch.setattr(run.engine, "begin_save", slow_save)
    monkeypatch.setattr(run.engine, "evaluate", slow_evaluate)
    lines = train(run)
    steps = [line for line in lines if "speed/step_seconds" in line]
    assert len(steps) == 8
    for line in steps[1:]:
        assert line["speed/step_seconds"] < PAUSE
        assert line["speed/tokens_per_second"] * line["speed/step_seconds"] == pytest.approx(8 * 64)
    assert [line["step"] for line in lines if line.get("time/save", 0) >= PAUSE] == [3, 5, 7, 8]
    assert all(line["time/validation"] >= PAUSE for line in lines if "valid/loss" in line)


def test_the_time_left_has_the_saves_and_validations_that_will_come(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After step 3 of 8 there are saves at 4, 6 and 8 to come; once none is left only steps are."""
    run = build(tiny(train={"steps": 8, "eval_every": 0}, checkpoint={"every": 2}))

    def slow_save(_: Path) -> Files:
        time.sleep(PAUSE)
        return Files(())

    monkeypatch.setattr(run.engine, "begin_save", slow_save)
    lines = {line["step"]: line for line in train(run) if "speed/seconds_left" in line}
    assert lines[3]["speed/seconds_left"] == pytest.approx(3 * PAUSE + 5 * lines[3]["speed/step_seconds"], rel=0.05)
    assert lines[8]["speed/seconds_left"] == 0
