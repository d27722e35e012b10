"""F9: numbers that are none, put into one gradient, one loss or one rank."""

import hashlib
import math
import os
from collections.abc import Callable
from typing import Any

from faults.case import Times, Trial, WrongError, expect
from faults.hooks import Strike, around
from faults.killing import told
from faults.processes import start_ranks
from faults.world import STEPS, lines

_ENGINE = "megatron_sep.train.megatron_engine:MegatronEngine"
_LIMIT = 4
"""train.max_skipped_steps of these runs."""


def not_finite(trial: Trial) -> Times:
    """NaN or infinity in a gradient or the loss of some steps in a row, on one process or one of two; fp16."""
    kind = trial.number % 4
    if kind == 3:
        return _fp16_overflows(trial)
    random, run = trial.random, trial.folder / "run"
    first, burst = random.randint(2, 6), random.choice((1, 2, _LIMIT - 1, _LIMIT))
    value, one_rank = random.choice((math.nan, math.inf, -math.inf)), kind == 2
    struck = _poison(range(first, first + burst), value, random.random(), in_loss=kind == 1, one_rank=one_rank)
    settings = (f"train.max_skipped_steps={_LIMIT}",)
    ranks = start_ranks(trial.world, run, 2 if one_rank else 1, *settings, before=struck)
    ended = [rank.wait() for rank in ranks]
    if any("WEIGHTS CHANGED" in one.text for one in ended):
        raise WrongError("a step that was skipped changed a weight")
    if burst == _LIMIT:
        told(ended[0], 1, f"step {first + burst - 1}", f"not finite {_LIMIT} steps in a row")
        return Times(ended[0].seconds)
    expect([one.code for one in ended] == [0] * len(ended), [one.text[-300:] for one in ended])
    found = lines(run)
    expect(found[-1]["step"] == STEPS and found[-1]["train/skipped"] == burst, found[-1])
    expect(math.isfinite(found[-1]["train/loss"]), found[-1])
    return Times()


def _poison(steps: range, value: float, place: float, in_loss: bool, one_rank: bool) -> Strike:
    """Put ``value`` into a gradient of these steps, and watch that no weight follows it."""
    count = [0]
    before: list[str] = []

    def poisoned(original: Callable[..., Any], engine: Any, *arguments: Any) -> Any:
        loss = original(engine, *arguments)
        count[0] += 1
        if count[0] in steps:
            before.append(_sum(engine))
        if count[0] in steps and not (one_rank and os.environ.get("RANK", "0") == "0"):
            gradients = [parameter.main_grad.view(-1) for parameter in _parameters(engine)]
            chosen = gradients[int(place * len(gradients))]
            chosen[int(place * chosen.numel())] = value
            for gradient in gradients if one_rank else ():  # they are reduced already, and some part is this rank's
                gradient.fill_(value)
            return loss * value if in_loss else loss
        return loss

    def watched(original: Callable[..., Any], engine: Any, *arguments: Any) -> Any:
        result = original(engine, *arguments)
        if before and before.pop() != _sum(engine):
            print("WEIGHTS CHANGED", flush=True)
        return result

    def put() -> None:
        around(f"{_ENGINE}.forward_backward", poisoned)()
        around(f"{_ENGINE}.step", watched)()

    return put


def _parameters(engine: Any) -> list[Any]:
    """Of every part of the layers that this rank holds."""
    return [parameter for part in engine._weights for parameter in part.parameters()]


def _sum(engine: Any) -> str:
    digest = hashlib.sha256()
    for parameter in _parameters(engine):
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _fp16_overflows(trial: Trial) -> Times:
    """A loss scale that is far too large: halved step by step, those steps skipped, then trained."""
    run, power = trial.folder / "run", trial.random.randint(22, 27)
    scale = f"train.loss_scale={{initial: {2.0**power}, growth_interval: 1000, hysteresis: 1}}"
    settings = ("train.precision=fp16", scale, "train.max_skipped_steps=30", "train.steps=30", "metrics.every=1")
    ended = trial.world.train(run, *settings, "checkpoint.every=30")
    expect(ended.code == 0, ended.text[-300:])
    found = lines(run)
    skipped, now = found[-1]["train/skipped"], found[-1]["train/loss_scale"]
    expect(0 < skipped < 30 and math.isfinite(found[-1]["train/loss"]), found[-1])
    if now != 2.0 ** (power - skipped):
        raise WrongError(f"{skipped} steps were skipped from a scale of 2^{power}, which is now {now}")
    return Times()
