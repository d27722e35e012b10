"""A run that goes on with other settings: what follows the step does so, what is kept is kept, and both are said."""

from collections.abc import Callable

import pytest

from megatron_sep.config import RunConfig
from megatron_sep.parallel.groups import topology
from megatron_sep.train.metrics import read_jsonl
from megatron_sep.train.schedule import LearningRate

pytestmark = pytest.mark.usefixtures("single_process")


def build(config: RunConfig) -> "Run":  # noqa: F821
    from megatron_sep.train.run import build_run

    return build_run(config, topology())


def train(run: "Run") -> None:  # noqa: F821
    from megatron_sep.train.loop import train as loop

    loop(run)


def rates(config: RunConfig) -> dict[int, float]:
    lines = read_jsonl(config.dir / "metrics.jsonl")
    return {int(line["step"]): line["train/lr"] for line in lines if "train/lr" in line}


def windows_of(run: "Run") -> list[int | None]:  # noqa: F821
    """The window of layer 1 in each step that the run is trained for."""
    rules, found = run.train_data.rules, []

    def noted(step: int) -> object:
        found.append(rules(step).patterns[1].window)
        return rules(step)

    run.train_data.rules = noted
    train(run)
    return found


def test_annealing_follows_the_step_whatever_the_batch(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """32 to 8 in 8 steps, the second half of them with twice the sequences a step."""
    sections = {"attention": {"anneal": {"start": 32, "steps": 8}}, "optimizer": {"decay_steps": 8}}
    first = windows_of(build(tiny(**sections, train={"eval_every": 0, "steps": 4})))
    second = windows_of(build(tiny(**sections, train={"eval_every": 0, "steps": 9, "global_batch_size": 16})))
    assert first + second == [32, 32, 32, 32, 16, 16, 16, 16, 8]
    assert "from here on with other settings: train.global_batch_size: 8, now 16\n" in capsys.readouterr().out


def test_more_steps_leave_the_learning_rate_as_it_was_planned(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun for 8 steps, raised to 10 and to 12: the rate stays at its minimum from step 8 on, and it is said."""
    planned = LearningRate(tiny().optimizer, 8)
    for steps in (8, 10, 12):
        train(build(tiny(train={"steps": steps, "eval_every": 0})))
    assert rates(tiny()) == {step: pytest.approx(planned(step)) for step in range(1, 13)}
    said = capsys.readouterr().out
    assert "the learning rate falls until step 8, as this run was started; train.steps is now 12: set opt" in said
    assert "other settings" not in said


def test_a_schedule_that_is_asked_for_is_followed(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """With optimizer.decay_steps set the run goes on under it, and the change is said."""
    train(build(tiny(train={"steps": 4, "eval_every": 0})))
    train(build(tiny(train={"steps": 12, "eval_every": 0}, optimizer={"decay_steps": 12})))
    planned = LearningRate(tiny().optimizer, 12)
    assert {s: r for s, r in rates(tiny()).items() if s > 4} == {s: pytest.approx(planned(s)) for s in range(5, 13)}
    assert "from here on with other settings: optimizer.decay_steps: 4, now 12" in capsys.readouterr().out
