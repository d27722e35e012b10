"""A loss far above those before it is told with its documents, and skipped or undone where that is asked for."""

from collections.abc import Callable, Iterable
from random import Random
from typing import Any

import pytest
from torch import Tensor

from megatron_sep.config import RunConfig
from megatron_sep.parallel.groups import topology
from megatron_sep.report.batch import view_step
from megatron_sep.train.rollback import SpikesError
from megatron_sep.train.written import read_history, read_jsonl
from megatron_sep.weights.sealed import LossLevel

pytestmark = pytest.mark.usefixtures("single_process")

SIZE = 8
"""Sequences of a step."""


def spiking(tiny: Callable[..., RunConfig], policy: str, **train: Any) -> RunConfig:
    settings = {"steps": 10, "eval_every": 0, "spike": {"policy": policy, "warmup": 4}} | train
    return tiny(train=settings, checkpoint={"every": 4, "background": False}, optimizer={"decay_steps": 10})


def train(config: RunConfig, bad: Iterable[int] = ()) -> "Run":  # noqa: F821
    """Train; the loss and gradients of steps that read the sequences from ``bad`` on are ten times as large."""
    from megatron_sep.train.loop import train as loop
    from megatron_sep.train.run import build_run

    run = build_run(config, topology())
    forward_backward = run.engine.forward_backward

    def scaled(batches: Any, count: int) -> Tensor:
        return forward_backward(batches, count) * (10 if run.state.consumed in bad else 1)

    run.engine.forward_backward = scaled
    loop(run)
    return run


def losses(run: "Run") -> dict[int, float]:  # noqa: F821
    lines = read_jsonl(run.config.dir / "metrics.jsonl")
    return {int(line["step"]): line["train/loss"] for line in lines if "train/loss" in line}


def told(run: "Run") -> list[dict[str, Any]]:  # noqa: F821
    return [line for line in read_history(run.config.dir) if line["event"] in ("spike", "skip", "rollback")]


def test_a_spike_is_told_with_the_documents_that_batch_shows(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 6 reads sequences 40 to 47: its documents are those of `batch --step 6`, and the weights are changed."""
    run = train(spiking(tiny, "log"), bad=[40])
    (spike,) = told(run)
    assert (spike["step"], spike["sequences"], spike["policy"]) == (6, [40, 47], "log")
    views = view_step(run.config, 6, range(SIZE))
    expected = {origin.document for view in views for origin in view.origins}
    assert list(spike["documents"].values()) == [sorted(expected)]
    said = capsys.readouterr().out
    assert "step 6: the loss of" in said
    assert "sequences 40 to 47 of the run" in said
    assert "`batch --step 6` shows them" in said
    assert run.state.skipped == 0


def test_a_skipped_spike_changes_no_weight(tiny: Callable[..., RunConfig]) -> None:
    """The step is counted and its data are passed over; step 7 starts from the weights of step 5."""
    run = train(spiking(tiny, "skip"), bad=[40])
    assert [(line["event"], line["step"]) for line in told(run)] == [("spike", 6), ("skip", 6)]
    assert (run.state.skipped, run.state.consumed) == (1, 80)
    assert losses(run)[7] < losses(run)[5]


def test_a_rollback_goes_on_with_other_data_from_the_newest_checkpoint(tiny: Callable[..., RunConfig]) -> None:
    """Spike in step 6: back to step 4, on with sequence 48; each step stands once, and `batch` knows what it read."""
    config = spiking(tiny, "rollback")
    run = train(config, bad=[40])
    assert [(line["event"], line["step"]) for line in told(run)] == [("spike", 6), ("rollback", 4)]
    assert (run.state.step, run.state.consumed) == (10, 80 + 16)
    lines = [line for line in read_jsonl(config.dir / "metrics.jsonl") if "train/loss" in line]
    assert [(line["step"], line["train/consumed"]) for line in lines] == [
        *((step, step * SIZE) for step in range(1, 5)),
        *((step, step * SIZE + 16) for step in range(5, 11)),
    ]
    assert view_step(config, 5)[0].sample == 48
    assert view_step(config, 4)[0].sample == 24


def test_a_run_that_spikes_whatever_the_data_stops(tiny: Callable[..., RunConfig]) -> None:
    """After three rollbacks to the same checkpoint; its weights are what is wrong."""
    with pytest.raises(SpikesError, match=r"spiked again after 3 rollbacks to .*step-00000004, each with other data"):
        train(spiking(tiny, "rollback"), bad=range(40, 200))


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, and training goes on."""
    config = spiking(tiny, "rollback")
    late = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 99})})
    assert train(late, bad=[40]).state.consumed == 80
    assert "step 6: no checkpoint to go back to yet; training goes on" in capsys.readouterr().out


def test_a_resumed_run_judges_as_an_uninterrupted_one(tiny: Callable[..., RunConfig]) -> None:
    """What the loss is judged by lies in the checkpoint, to the last bit."""
    run = train(spiking(tiny, "skip"), bad=[40])
    from megatron_sep.train.run import build_run

    assert build_run(run.config, topology()).state == run.state


def test_the_level_follows_the_losses_and_bounds_what_is_usual() -> None:
    """10,000 draws around 3: none above 8 deviations; ten times as much is; a constant loss has a bound above it."""
    random, level = Random(0), LossLevel()
    for _ in range(10_000):
        loss = random.gauss(3.0, 0.2)
        assert level.steps < 100 or loss < level.bound(8)
        level = level.after(loss)
    assert level.mean == pytest.approx(3.0, abs=0.1)
    assert level.variance**0.5 == pytest.approx(0.2, rel=0.3)
    assert level.bound(8) < 30
    constant = LossLevel()
    for _ in range(200):
        constant = constant.after(2.0)
    assert constant.bound(8) == pytest.approx(2.16)
    assert constant.after(float("nan")) == constant
