"""LayerNorm and RMSNorm over the last axis, as modules with a ``weight`` and, LayerNorm, a ``bias``."""

from typing import Protocol

import torch
from torch import nn


class MakeNorm(Protocol):
    """What a row of ``layernorm`` or ``rmsnorm`` names: it makes the norm of one place in the model."""

    def __call__(self, size: int, eps: float, dtype: torch.dtype) -> nn.Module:
        """A norm of ``size`` values, its parameters of ``dtype`` on torch's default device."""
        ...
