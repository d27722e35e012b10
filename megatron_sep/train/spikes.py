"""Losses far above those before them: told with their documents, and skipped or undone where that is asked for."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sep.config.schema import SpikeConfig
from megatron_sep.data.samples import Samples
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.engine import Engine
from megatron_sep.train.history import History
from megatron_sep.train.outcomes import Outcome
from megatron_sep.weights.sealed import LossLevel, TrainState

_SHOWN = 5
"""Documents that a message names; the history has all of them."""


@dataclass(frozen=True)
class Spikes:
    """Judges each step's loss by those before it; all ranks come to the same, for they all have the same loss."""

    config: SpikeConfig
    samples: Samples
    batch: int
    """Sequences of a step."""
    history: History
    topology: Topology

    @property
    def wait(self) -> bool:
        """Must a step be over before the next one begins?"""
        return self.config.policy in ("skip", "rollback")

    def step(self, engine: Engine, loss: Tensor, lr: float, state: TrainState) -> Tensor:
        """The norm of the optimizer's step; NaN, and no step, where the loss spikes and such steps are skipped.

        ``state`` is that before the step.
        """
        if self.config.policy == "skip" and self._is_spike(float(loss), state.level):
            self._tell(float(loss), state.step + 1, state.consumed, state.level)
            return torch.full_like(loss, math.nan)
        return engine.step(lr).grad_norm

    def judged(self, outcome: Outcome, state: TrainState) -> tuple[bool, LossLevel]:
        """Is a step that was learnt from a spike, and the level of the losses after it; ``state`` may be a step on."""
        level, loss = state.level, outcome.loss
        if self.config.policy == "off" or not outcome.applied:
            return False, level
        spiked = self._is_spike(loss, level)
        if spiked:
            self._tell(loss, outcome.step, state.consumed - (state.step - outcome.step + 1) * self.batch, level)
        usual = min(loss, level.bound(self.config.deviations)) if level.steps >= self.config.warmup else loss
        return spiked, level.after(usual)

    def _is_spike(self, loss: float, level: LossLevel) -> bool:
        return level.steps >= self.config.warmup and loss > level.bound(self.config.deviations)

    def _tell(self, loss: float, step: int, first: int, level: LossLevel) -> None:
        if not self.topology.first:
            return
        documents = _documents(self.samples, range(first, first + self.batch))
        bound = level.bound(self.config.deviations)
        self.history.add(
            "spike",
            step=step,
            loss=loss,
            bound=bound,
            policy=self.config.policy,
            sequences=[first, first + self.batch - 1],
            documents=documents,
        )
        self.topology.say(
            f"step {step}: the loss of {loss:.3f} is a spike, above {bound:.3f}; sequences {first} to "
            f"{first + self.batch - 1} of the run: {'; '.join(_named(documents))}. `batch --step {step}` shows them"
        )


def _documents(samples: Samples, indices: Iterable[int]) -> dict[str, list[int]]:
    """The documents, or lines, of some sequences, by file."""
    found: dict[str, set[int]] = {}
    for index in indices:
        for origin in samples.origins(index):
            record: dict[str, Any] = origin.record()
            file, number = str(record.get("index", record.get("path"))), record.get("document", record.get("line"))
            found.setdefault(file, set()).add(int(number or 0))
    return {file: sorted(numbers) for file, numbers in found.items()}


def _named(documents: dict[str, list[int]]) -> list[str]:
    return [
        f"{file} document {', '.join(map(str, numbers[:_SHOWN]))}"
        + (f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else "")
        for file, numbers in documents.items()
    ]
