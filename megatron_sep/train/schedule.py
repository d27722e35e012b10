"""The learning rate of each step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_sep.config.schema import OptimizerConfig

_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "linear_to_zero": lambda done: 1 - done,
    "constant": lambda _: 1.0,
}
_TO_ZERO = {"linear_to_zero"}
"""Decays that head for 0 and stop at `min_lr`; the others head for `min_lr` itself."""


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to ``lr``, then a decay that reaches ``min_lr`` at ``decay_steps`` and stays there."""

    config: OptimizerConfig
    decay_steps: int

    def __call__(self, step: int) -> float:
        """For step 1, 2, ...: the warm-up's last step is the first at full rate."""
        warmup = self.config.warmup * self.decay_steps
        if step < warmup:
            return self.config.lr * step / warmup
        done = min(1.0, (step - warmup) / max(1.0, self.decay_steps - warmup))
        low = 0.0 if self.config.decay in _TO_ZERO else self.config.min_lr
        return max(self.config.min_lr, low + (self.config.lr - low) * _SHAPES[self.config.decay](done))
