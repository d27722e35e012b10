"""LayerNorm and RMSNorm over the last axis, as modules with a ``weight`` and, LayerNorm, a ``bias``."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class MakeNorm(Protocol):
    """What a row of ``layernorm`` or ``rmsnorm`` names: it makes the norm of one place in the model."""

    def __call__(self, size: int, eps: float, dtype: torch.dtype) -> nn.Module:
        """A norm of ``size`` values, its parameters of ``dtype`` on torch's default device."""
        ...


class OpenResidual(Protocol):
    """What a row of ``open_residual`` names: where a branch or two leave the residual stream."""

    def __call__(
        self, x: Tensor, norms: Sequence[nn.Module], biases: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The norms of the stream x [..., C], one or two modules of one ``MakeNorm``, and x + the sum of ``biases``.

        The biases [C], none to two, are those of the matrix products whose outputs will be added to the stream.
        """
        ...
