"""AdamW (arXiv 1711.05101): an optimizer class and what an engine has to know of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class AdamW:
    """What a row of ``adamw`` names."""

    library: str
    """Whose conventions it follows: "torch", "apex" or "transformer_engine"."""
    kind: type[Optimizer]
    """Takes parameters, lr, betas, eps and weight_decay; keeps the moments as ``exp_avg`` and ``exp_avg_sq``."""
    settings: Mapping[str, Any]
    """Of each group of parameters, beside those."""
    start: Callable[[Tensor], dict[str, Tensor]]
    """A parameter's state before the first step."""
    skips_by_itself: bool = False
    """Its ``step`` heeds the tensors ``grad_scale``, which gradients are divided by, and ``found_inf``: where that is 1
    nothing changes. So nobody has to look at a norm on the host first."""


def moments(parameter: Tensor) -> dict[str, Tensor]:
    """For a class that counts the steps of a group of parameters."""
    return {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def step_and_moments(parameter: Tensor) -> dict[str, Tensor]:
    """For a class that counts the steps of each parameter."""
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments(parameter)}
