"""F11: jobs that go on with another number of processes, or another layout of them."""

import math

from faults.case import Times, Trial, WrongError, expect
from faults.processes import start_ranks
from faults.world import EVERY, STEPS, lines

Layout = tuple[int, tuple[str, ...]]
LAYOUTS: dict[str, Layout] = {
    "1 process": (1, ()),
    "2 data parallel": (2, ()),
    "2 tensor parallel": (2, ("parallel.tensor=2",)),
    "2 pipeline parallel": (2, ("parallel.pipeline=2",)),
    "4 data parallel": (4, ("train.micro_batch_size=1",)),
    "4, tensor and data parallel": (4, ("parallel.tensor=2",)),
}
_CHANGES = (
    ("1 process", "2 data parallel"),
    ("2 data parallel", "1 process"),
    ("2 tensor parallel", "2 pipeline parallel"),
    ("4 data parallel", "2 data parallel"),
    ("2 data parallel", "4, tensor and data parallel"),
    ("2 pipeline parallel", "1 process"),
)


def another_layout(trial: Trial) -> Times:
    """Half of the steps in one layout, the rest in another: the same sequences, losses within 1e-5 of one process."""
    run, plain = trial.folder / "run", trial.folder / "plain"
    settings = ("model.hidden_dropout=0", "optimizer.decay_steps=12")
    expect(trial.world.train(plain, *settings).code == 0, "the run in one layout failed")
    half = EVERY * trial.random.choice((1, 2, 3))
    for steps, name in zip((half, STEPS), _CHANGES[trial.number % len(_CHANGES)], strict=True):
        count, layout = LAYOUTS[name]
        ranks = start_ranks(trial.world, run, count, *settings, *layout, f"train.steps={steps}")
        ended = [rank.wait() for rank in ranks]
        expect([one.code for one in ended] == [0] * count, f"{name}: {[one.text[-300:] for one in ended]}")
    for one, other in zip(lines(run), lines(plain), strict=True):
        same = one["train/consumed"] == other["train/consumed"]
        if not same or not math.isclose(one["train/loss"], other["train/loss"], rel_tol=1e-5):
            raise WrongError(f"step {one['step']}: loss {one['train/loss']}, in one layout {other['train/loss']}")
    return Times()
