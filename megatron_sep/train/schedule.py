"""The learning rate of each step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_sep.config.schema import OptimizerConfig

_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda _: 1.0,
}


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
        return self.config.min_lr + (self.config.lr - self.config.min_lr) * _SHAPES[self.config.decay](done)
